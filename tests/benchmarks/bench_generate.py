"""Greedy decoding beside transformers' generate: the same weights, dtype, batch and number of tokens."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import geometries
import torch
from timing import QUICK, Pair, Row, interleaved, now, report
from transformers import StoppingCriteria, StoppingCriteriaList

from hooked_qwen2vl.selfcheck import reference_batch


@torch.no_grad()
def rows(name: str, batch_size: int, image_tokens: int) -> Iterator[Row]:
    """Tokens per second of the whole call, and of the steps after the first token alone."""
    model, hf = geometries.both(name)
    inputs, new = geometries.prompt(model, image_tokens, batch_size), 16 if QUICK else 32
    batch, settings = reference_batch(inputs), {"max_new_tokens": new, "do_sample": False}

    def ours(*criteria):
        stopping = StoppingCriteriaList(criteria)
        return model.generate(inputs, **settings, stopping_criteria=stopping, stop_at_eos=False, return_type="tokens", verbose=False)

    def theirs(*criteria):
        hf.model.rope_deltas = None
        return hf.generate(**batch, **settings, stopping_criteria=StoppingCriteriaList(criteria), eos_token_id=-1)

    note = "the same tokens" if torch.equal(ours(), theirs()) else "the tokens differ"
    size = f"{geometries.describe(name, inputs)}, {new} new"
    whole = interleaved(ours, theirs, n=7)
    yield whole.row(5, "tokens per second, generate / transformers", size, "≥ 1.0", note, invert=True)
    steps = token_by_token(ours, theirs)
    note = "both decode at once and take turns at every token"
    yield steps.row(5, "tokens per second after the first, generate / transformers", size, "≥ 1.0", note, invert=True)
    yield tower_runs(model, ours, size)


class Turn(StoppingCriteria):
    """Stops nothing; at every token notes how long the step took, and waits while the other side makes one."""

    def __init__(self, steps: list[float]):
        self.steps, self.granted, self.started = steps, threading.Semaphore(0), None

    def __call__(self, tokens, logits, **_):
        if self.started is not None:
            self.steps.append(now() - self.started)
        self.other.granted.release()
        self.granted.acquire()
        self.started = now()
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    def run(self, generate) -> None:
        """One generation, begun when the other side grants it; once done, the other need not wait any more."""
        self.granted.acquire()
        try:
            generate(self)
        finally:
            self.other.granted.release(2**20)


def token_by_token(ours, theirs, n: int = 4) -> Pair:
    """Seconds of every step after the first token, of two generations in two threads that run one at a time."""
    steps = Pair()
    for number in range(2 if QUICK else n):
        turns = Turn(steps.ours), Turn(steps.theirs)
        turns[0].other, turns[1].other = turns[::-1]
        turns[number % 2].granted.release()
        with ThreadPoolExecutor(2) as threads:
            for side in [threads.submit(turn.run, call) for turn, call in zip(turns, (ours, theirs))]:
                side.result()
    return steps


def tower_runs(model, call, size: str) -> Row:
    """How often the tower runs while decoding, and for how many positions the decoder computes rotations."""
    runs, positions = [], []
    tower, blocks = model.vision_encoder.forward, model.run_blocks
    model.vision_encoder.forward = lambda *args, **kwargs: (runs.append(1), tower(*args, **kwargs))[1]
    model.run_blocks = lambda residual, *args, **kwargs: (positions.append(residual.shape[1]), blocks(residual, *args, **kwargs))[1]
    call()
    del model.vision_encoder.forward, model.run_blocks
    note = f"positions run, step by step: {positions[0]}, then {sorted(set(positions[1:]))}"
    return Row(5, "runs of the tower in one generation", size, len(runs), "", goal="≤ 1", note=note)


if __name__ == "__main__":
    whole = [("small", 1, 300), ("small", 4, 300), ("small", 1, 1500), ("medium", 1, 300), ("medium", 4, 300)]
    sizes = [("small", 1, 60), ("small", 4, 60)] if QUICK else whole
    report("generate", *(partial(rows, *size) for size in sizes))
