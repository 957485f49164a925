"""What the runs' tests run in processes of its own, with one thread each: real work of a tiny model, with random numbers in
it; or a command."""

from __future__ import annotations

import random
import signal
import time

import torch
from conftest import picture
from same_runs import one_thread
from tiny import tiny_hf, tiny_processor

from analyses.data.examples import Example
from analyses.experiments import flips, hallucination, max_activating, neurons  # noqa: F401, so that commands start at once
from analyses.runs.engine import run
from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.cli import main
from hooked_qwen2vl.image_embeddings import ImageEmbeddingsCache

MODEL = HookedQwen2VL.from_hf(tiny_hf(), tiny_processor())
SHAPES = [(56, 56), (84, 56), (140, 84)]
QUESTIONS = ["what?", "which of them is red, and which of them is blue?", "go on"]


def questions(n: int) -> list[Example]:
    """Two questions an image, of several sizes and lengths."""
    images = [(picture(*SHAPES[i // 2 % 3], seed=i // 2),) if i % 7 else () for i in range(n)]
    return [Example(f"q{i}", QUESTIONS[i % 3], "", images[i]) for i in range(n)]


def answer_with(model: HookedQwen2VL, pause: float = 0.0):
    """Two rows a question: the top token's log-probability at two positions, and a random number."""
    embeddings = ImageEmbeddingsCache(model)

    @torch.no_grad()
    def work(batch: list[Example]):
        time.sleep(random.random() * pause)
        inputs = embeddings(model.to_inputs([e.question for e in batch], images=[list(e.images) for e in batch]))
        best = model(inputs)[:, -2:].log_softmax(-1).max(-1)
        for row, example in enumerate(batch):
            for place in range(2):
                yield {
                    "id": example.id, "place": place, "log_prob": float(best.values[row, place]),
                    "token": int(best.indices[row, place]), "noise": float(torch.rand(())) + random.random(),
                }  # fmt: skip

    return work


@one_thread()
def command(*arguments: str) -> None:
    """A command of `hooked-qwen2vl`; its imports are done before the fork. Ctrl-C works, also where the tests' shell ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    raise SystemExit(main(arguments))


@one_thread()
def full_run(out: str, n: int, pause: float = 0.0, **settings) -> None:
    """Batches small and parts many, so that a kill finds something half-done."""
    work = answer_with(MODEL, pause)
    small = {"batch_size": 2, "batches_per_shard": 1, "window": 32, "progress": False}
    run("answers", questions(n), work, out, model=MODEL, **small, **settings)
