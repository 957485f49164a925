"""Greedy decoding beside transformers' generate: the same weights, dtype, batch and number of tokens."""

from __future__ import annotations

from collections.abc import Iterator

import geometries
import torch
from timing import QUICK, Pair, Row, now, report, seconds
from transformers import StoppingCriteria, StoppingCriteriaList

from hooked_qwen2vl.selfcheck import reference_batch


@torch.no_grad()
def rows(name: str, batch_size: int) -> Iterator[Row]:
    """Tokens per second of the whole call, and of the steps after the first token alone."""
    model, hf = geometries.both(name)
    inputs, new = geometries.prompt(model, 60 if QUICK else 300, batch_size), 16 if QUICK else 32
    batch = reference_batch(inputs)

    clock = Clock()
    settings = {"max_new_tokens": new, "do_sample": False, "stopping_criteria": StoppingCriteriaList([clock])}

    def ours():
        return model.generate(inputs, **settings, stop_at_eos=False, return_type="tokens", verbose=False)

    def theirs():
        hf.model.rope_deltas = None
        return hf.generate(**batch, **settings, eos_token_id=-1)

    same = torch.equal(ours(), theirs())
    size = f"{geometries.describe(name, inputs)}, {new} new"
    whole, steps = timed(ours, theirs, clock)
    note = "the same tokens" if same else "the tokens differ"
    yield whole.row(5, "tokens per second, generate / transformers", size, "≥ 1.0", note, invert=True)
    yield steps.row(5, "tokens per second after the first, generate / transformers", size, "≥ 1.0", invert=True)
    yield tower_runs(model, ours, size)


class Clock(StoppingCriteria):
    """Stops nothing; notes the time at every token."""

    def __init__(self):
        self.at: list[float] = []

    def __call__(self, tokens, logits, **_):
        self.at.append(now())
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)


def timed(ours, theirs, clock: Clock, n: int = 7) -> tuple[Pair, Pair]:
    """Seconds of a whole generation, and from its first token to its last."""
    whole, steps = Pair(), Pair()
    for number in range(5 if QUICK else n):
        for side in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
            clock.at.clear()
            getattr(whole, side).append(seconds(ours if side == "ours" else theirs))
            getattr(steps, side).append(clock.at[-1] - clock.at[0])
    return whole, steps


def tower_runs(model, call, size: str) -> Row:
    """How often the tower runs while decoding, and for how many positions the decoder computes rotations."""
    runs, positions = [], []
    tower, blocks = model.vision_encoder.forward, model._run_blocks
    model.vision_encoder.forward = lambda *args: (runs.append(1), tower(*args))[1]
    model._run_blocks = lambda residual, *args: (positions.append(residual.shape[1]), blocks(residual, *args))[1]
    call()
    del model.vision_encoder.forward, model._run_blocks
    note = f"positions run, step by step: {positions[0]}, then {sorted(set(positions[1:]))}"
    return Row(5, "runs of the tower in one generation", size, len(runs), "", goal="≤ 1", note=note)


if __name__ == "__main__":
    sizes = (("small", 1), ("small", 4)) if QUICK else (("small", 1), ("small", 4), ("medium", 1), ("medium", 4))
    report("generate", (row for name, batch_size in sizes for row in rows(name, batch_size)))
