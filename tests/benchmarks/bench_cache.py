"""run_with_cache: its time beside the plain forward's, and its memory beside the bytes it keeps."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import geometries
import torch
from timing import MIB, QUICK, Row, extra_memory, give_back_at_once, interleaved, report

from hooked_qwen2vl import HookedCache
from hooked_qwen2vl.selfcheck import reference_batch

COSTLY = ("attn_scores", "pattern", "hook_result", "q_input", "k_input", "v_input", "attn_in")


@torch.no_grad()
def times(name: str) -> Iterator[Row]:
    model, _ = geometries.both(name)
    inputs = geometries.prompt(model, 60 if QUICK else 300)
    size = geometries.describe(name, inputs)

    def plain():
        return model(inputs)

    usual = [key for key in model.hook_dict if not key.endswith(COSTLY)]
    pair = interleaved(lambda: model.run_with_cache(inputs, names_filter=usual), plain)
    yield pair.row(2, f"run_with_cache of {len(usual)} activations (no scores, pattern, per-head) / forward", size, "≤ 1.15")
    pair = interleaved(lambda: model.run_with_cache(inputs), plain)
    yield pair.row(2, "run_with_cache by default (with scores and pattern) / forward", size)
    pair = interleaved(lambda: model.run_with_cache(inputs, names_filter=lambda key: True), plain, n=5)
    yield pair.row(2, f"run_with_cache of all {len(model.hook_dict)} activations / forward", size)


@torch.no_grad()
def long(name: str, n_tokens: int) -> Iterator[Row]:
    """The residual stream of a large picture."""
    model, _ = geometries.both(name)
    inputs = model.encode(geometries.prompt(model, n_tokens))
    streams = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    pair = interleaved(lambda: model.run_with_cache(inputs, names_filter=streams), lambda: model(inputs))
    what = f"run_with_cache of the residual stream ({len(streams)} activations) / forward"
    yield pair.row(2, what, f"{geometries.describe(name, inputs)}, encoded", "≤ 1.15")


@torch.no_grad()
def memory(name: str, n_tokens: int) -> Iterator[Row]:
    """Peaks above the model, run without logits so that those do not hide the cache."""
    give_back_at_once()
    model, hf = geometries.both(name)
    inputs = model.encode(geometries.prompt(model, n_tokens))
    size = geometries.describe(name, inputs)
    text, settings = model.cfg.text, {"return_type": None}
    streams = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    model(inputs, **settings)
    plain = extra_memory(lambda: model(inputs, **settings))
    own = kept(model.run_with_cache(inputs, names_filter=streams, **settings)[1])
    with_streams = extra_memory(lambda: model.run_with_cache(inputs, names_filter=streams, device="cpu", **settings))
    note = f"{with_streams:.0f} MiB at its peak; the run alone {plain:.0f}; the cache itself {own:.0f}"
    yield Row(2, "caching the residual stream alone: (peak − the run's own peak) / its bytes", size,
              (with_streams - plain) / own, goal="≤ 1.05", note=note)  # fmt: skip
    one = extra_memory(lambda: model.run_with_cache(inputs, names_filter=streams, pos_slice=-1, **settings))
    yield Row(7, "the same at the last position only: peak above the run's own", size, one - plain, "MiB")
    everything = kept(model.run_with_cache(inputs[:1], names_filter=lambda key: not key.endswith(COSTLY), **settings)[1])
    yield Row(2, "a cache of all but scores, pattern, per-head: its bytes", size, everything, "MiB")
    patterns = text.n_layers * text.n_heads * inputs.shape[1] ** 2 * model.W_U.element_size() / MIB
    batch = reference_batch(inputs)
    hf.set_attn_implementation("eager")
    hf.model.rope_deltas = None
    eager = extra_memory(lambda: hf(**batch, output_attentions=True, logits_to_keep=1))
    yield Row(2, "transformers eager with output_attentions: peak", size, eager, "MiB",
              note=f"all its patterns are {patterns:.0f} MiB; at the 2B geometry {28 * 12 * 1570**2 * 2 / MIB:.0f}")  # fmt: skip


@torch.no_grad()
def disk(name: str) -> Iterator[Row]:
    """To a file and back, which maps it."""
    give_back_at_once()
    model, _ = geometries.both(name)
    inputs = geometries.prompt(model, 60 if QUICK else 300)
    _, cache = model.run_with_cache(inputs, names_filter=lambda key: not key.endswith(COSTLY))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.safetensors"
        saving = extra_memory(lambda: cache.save(path))
        back = HookedCache.load(path, model)
        assert all(torch.equal(back[key], value.cpu()) for key, value in cache.items())
        del back
        loading = extra_memory(lambda: HookedCache.load(path, model))
        size = f"{geometries.describe(name, inputs)}, {path.stat().st_size / MIB:.0f} MiB on disk"
        yield Row(7, "cache.save: peak extra memory", size, saving, "MiB", note="what is not contiguous is copied")
        yield Row(7, "HookedCache.load: anonymous memory", size, loading, "MiB", note="mapped, read when used")


def kept(cache: HookedCache) -> float:
    """MiB that a cache holds, shared storage once."""
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in cache.values()}
    return sum(storages.values()) / MIB


if __name__ == "__main__":
    sizes = ("small",) if QUICK else ("small", "medium")
    apart = [partial(memory, "small", 1500), partial(disk, "small"), *(partial(times, name) for name in sizes)]
    report("cache", *apart, *([] if QUICK else [partial(long, "small", 1500)]))
