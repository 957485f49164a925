"""The residual stream of every layer beside nnsight's, on the same weights in one process; needs nnsight.

nnsight lives in an environment of its own, which sees this one's packages too (see `run_all --nnsight`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import geometries
import torch
from nnsight import NNsight
from timing import QUICK, Row, interleaved, report

from hooked_qwen2vl.selfcheck import reference_batch


@torch.no_grad()
def rows(name: str) -> Iterator[Row]:
    model, hf = geometries.both(name)
    traced = NNsight(hf)
    inputs = geometries.prompt(model, 60 if QUICK else 300)
    batch, size = reference_batch(inputs), geometries.describe(name, inputs)
    layers = traced.model.language_model.layers
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]

    def theirs():
        hf.model.rope_deltas = None
        with traced.trace(**batch, use_cache=False):
            kept = []
            for layer in layers:
                kept.append(layer.output.save())
            kept = kept.save()
        return kept

    def ours():
        return model.run_with_cache(inputs, names_filter=names)[1]

    last = theirs()[-1]
    last = last[0] if isinstance(last, tuple) else last
    difference = (ours()[names[-1]] - last).abs().max().item()
    pair = interleaved(ours, theirs)
    yield pair.row(0, "run_with_cache of the residual stream / nnsight", size, note=f"largest difference {difference:.0e}")


if __name__ == "__main__":
    report("nnsight", *(partial(rows, name) for name in (("small",) if QUICK else ("small", "medium"))))
