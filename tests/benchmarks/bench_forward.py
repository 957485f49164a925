"""The plain forward with an image, and with hooks on the residual stream, beside transformers'.

python bench_forward.py [small medium 2b] [--quick]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

import geometries
import torch
from timing import BUDGET, QUICK, Row, interleaved, report

from hooked_qwen2vl.selfcheck import reference_batch

RESIDUAL = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")


@torch.no_grad()
def rows(name: str) -> Iterator[Row]:
    """Every pair of one size."""
    model, hf = geometries.both(name)
    large = name == "2b"
    inputs = geometries.prompt(model, 48 if large else 60 if QUICK else 300, template=not large)
    batch, size = reference_batch(inputs), geometries.describe(name, inputs)

    def theirs(**settings):
        hf.model.rope_deltas = None
        return hf(**batch, use_cache=False, **settings).logits

    def ours():
        return model(inputs)

    difference = (ours() - theirs()).abs().max().item() / theirs().float().std().item()
    note = f"largest difference of the logits {difference:.0e} of their spread"
    pair = interleaved(ours, theirs, budget=3 * BUDGET)  # the figure that matters most
    yield pair.row(1, "forward / transformers SDPA", size, "≤ 1.00", note)
    hooks = [(key, look) for key in model.hook_dict if key.startswith("blocks.") and key.endswith(RESIDUAL)]
    pair = interleaved(lambda: model.run_with_hooks(inputs, fwd_hooks=hooks), theirs)
    yield pair.row(1, f"forward with {len(hooks)} hooks on the residual stream / transformers SDPA", size, "≤ 1.03")
    if large:
        return
    streams = [key for key, _ in hooks if key.endswith("resid_pre")]
    pair = interleaved(lambda: model.run_with_cache(inputs, names_filter=streams), lambda: theirs(output_hidden_states=True))
    yield pair.row(0, "residual stream cached / transformers output_hidden_states", size)
    encoded = model.encode(inputs)
    yield interleaved(lambda: model(encoded), theirs).row(0, "forward from encode()d inputs / transformers SDPA", size)
    hf.set_attn_implementation("eager")
    pair = interleaved(ours, theirs)
    yield pair.row(0, "forward / transformers eager", size)


def look(activation, hook) -> None:
    """A hook that only looks."""


if __name__ == "__main__":
    names = [name for name in sys.argv[1:] if not name.startswith("-")] or ["small", "medium", "2b"]
    report("forward" if len(names) > 1 else f"forward_{names[0]}", *(partial(rows, name) for name in names))
