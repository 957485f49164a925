"""What counting firings costs beside the plain forward, on a batch of pictures of the embedded world.

Both run tower and decoder; both stop before the unembedding, which makes the plain forward as cheap as it gets.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from timing import DEVICE, Row, interleaved, report

from analyses.domain_neurons import FiringCounter
from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.scenes import sample

BATCH = 16


@torch.no_grad()
def rows() -> Iterator[Row]:
    model = HookedQwen2VL.from_pretrained("scenes").to(DEVICE)
    items = sample(BATCH, split="train")  # all domains in every batch: the most groups to count apart
    inputs = model.to_inputs([item.question for item in items], images=[[item.image] for item in items])
    domains, counter = [item.domain for item in items], FiringCounter(model)
    pair = interleaved(lambda: counter.add(model, inputs, domains), lambda: model(inputs, return_type=None), n=40, warm=3)
    yield pair.row(0, "counting firings / the plain forward", f"embedded model, {BATCH} questions", "≤ 1.1")


if __name__ == "__main__":
    report("neurons", rows)
