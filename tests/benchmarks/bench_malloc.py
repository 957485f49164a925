"""What `keep_freed_memory()` gains: the same work in processes that called it and in processes that did not, in turn.

The call cannot be taken back, so each side is a process: it warms up, times each piece of work, and gives the medians. A pair of
processes gives one ratio. CUDA has an allocator of its own: nothing is measured there.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import geometries
import torch
from bench_cache import COSTLY
from timing import DEVICE, QUICK, Pair, Row, report, seconds

from analyses.logit_lens import logit_lens
from analyses.patching import patch_sweep
from hooked_qwen2vl.malloc import keep_freed_memory

PAIRS, TIMES = (3, 3) if QUICK else (8, 7)
SIZE = "small"


@torch.no_grad()
def medians(kept: bool) -> tuple[str, dict[str, float]]:
    """Seconds of each piece of work, in a process of its own; and the size it was done at."""
    if kept:
        assert keep_freed_memory()
    model, _ = geometries.both(SIZE)
    inputs = geometries.prompt(model, 60 if QUICK else 300)
    usual = [key for key in model.hook_dict if not key.endswith(COSTLY)]
    other = inputs.clone()
    other.pixels.copy_(other.pixels.flip(0))
    pieces: dict[str, Callable[[], Any]] = {
        "forward": lambda: model(inputs),
        "a cache of all but scores, pattern, per-head": lambda: model.run_with_cache(inputs, names_filter=usual),
        "the default cache": lambda: model.run_with_cache(inputs),
        "the lens over all image tokens and layers": lambda: logit_lens(model, inputs, "image"),
        "32 tokens generated": lambda: model.generate(
            inputs, max_new_tokens=32, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False
        ),
        "a patching sweep of the last position": lambda: patch_sweep(
            model, inputs, other, lambda logits: logits[:, -1, 3], positions="last", progress=False
        ),
    }
    found = {}
    for name, call in pieces.items():
        call(), call()
        found[name] = statistics.median(seconds(call) for _ in range(TIMES))
    return geometries.describe(SIZE, inputs), found


def of_a_process(kept: bool) -> tuple[str, dict[str, float]]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(medians, kept).result()


def rows() -> Iterator[Row]:
    if DEVICE == "cuda":
        return
    sides: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    size = ""
    for number in range(PAIRS):
        for kept in (True, False) if number % 2 else (False, True):
            size, found = of_a_process(kept)
            sides[kept].append(found)
    for name in sides[True][0]:
        pair = Pair([found[name] for found in sides[True]], [found[name] for found in sides[False]])
        yield pair.row(0, f"{name}: with keep_freed_memory() / without", size)
    for name in sides[True][0]:
        for kept in (False, True) if "cache" in name else ():
            pair = Pair([found[name] for found in sides[kept]], [found["forward"] for found in sides[kept]])
            yield pair.row(0, f"{name} / forward, {'with' if kept else 'without'} keep_freed_memory()", size)


if __name__ == "__main__":
    report("malloc", rows)
