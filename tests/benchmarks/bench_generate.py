"""Greedy decoding beside transformers' generate: the same weights, dtype, batch and number of tokens."""

from __future__ import annotations

from collections.abc import Iterator

import geometries
import torch
from timing import QUICK, Pair, Row, report, seconds

from hooked_qwen2vl.selfcheck import reference_batch


@torch.no_grad()
def rows(name: str, batch_size: int) -> Iterator[Row]:
    """Tokens per second of the whole call, and of the steps after the first token alone."""
    model, hf = geometries.both(name)
    inputs, new = geometries.prompt(model, 60 if QUICK else 300, batch_size), 16 if QUICK else 32
    batch = reference_batch(inputs)

    def ours(n):
        return model.generate(
            inputs, max_new_tokens=n, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False
        )

    def theirs(n):
        hf.model.rope_deltas = None
        return hf.generate(**batch, max_new_tokens=n, do_sample=False, eos_token_id=-1)

    same = torch.equal(ours(new), theirs(new))
    size = f"{geometries.describe(name, inputs)}, {new} new"
    whole, steps = timed(ours, theirs, new)
    note = "the same tokens" if same else "the tokens differ"
    yield whole.row(5, "tokens per second, generate / transformers", size, "≥ 1.0", note, invert=True)
    yield steps.row(5, "tokens per second after the first, generate / transformers", size, "≥ 1.0", invert=True)
    yield tower_runs(model, lambda: ours(new), size)


def timed(ours, theirs, new: int, n: int = 7) -> tuple[Pair, Pair]:
    """Seconds of a whole generation, and of its steps after the first token: the same call for one token is taken off."""
    whole, steps = Pair(), Pair()
    ours(2), theirs(2)
    for number in range(5 if QUICK else n):
        for side in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
            call = ours if side == "ours" else theirs
            first = seconds(lambda: call(1))
            getattr(whole, side).append(seconds(lambda: call(new)))
            getattr(steps, side).append(getattr(whole, side)[-1] - first)
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
