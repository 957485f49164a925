"""The logit lens over all image tokens and layers, 151,936 tokens in the vocabulary: beside its matrix products alone, and its memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import geometries
import torch
from timing import DEVICE, MIB, QUICK, Row, extra_memory, give_back_at_once, interleaved, report
from transformer_lens.tools.analysis import logit_lens as transformer_lens_logit_lens

from analyses.common.vocabulary import predictions_of
from analyses.logit_lens import logit_lens
from hooked_qwen2vl import HookedQwen2VL

D_VOCAB = 151936
CHUNK = 128
GOAL = f"≤ {256e6 / MIB:.1f}"


def wide_model() -> HookedQwen2VL:
    """The medium size with the published vocabulary."""
    geometries.SIZES["medium"] = (*geometries.SIZES["medium"][:5], D_VOCAB, *geometries.SIZES["medium"][6:])
    return geometries.both("medium")[0]


def times() -> Iterator[Row]:
    model = wide_model()
    yield arithmetic(model)
    yield some(model, model.encode(geometries.prompt(model, 80 if QUICK else 300)))


def arithmetic(model) -> Row:
    few = torch.randn(CHUNK if QUICK else 4 * CHUNK, model.cfg.d_model, device=DEVICE)
    normalized, no_targets = model.ln_final(few[None])[0].detach(), torch.zeros(len(few), 1, dtype=torch.long)
    pair = interleaved(lambda: predictions_of(model, few, no_targets, 5), lambda: products(model, normalized), n=9)
    what = "reading vectors (top 5, entropy, one target) / the matrix products alone"
    size = f"{len(few)} vectors of {model.cfg.d_model}, {D_VOCAB} tokens in the vocabulary"
    return pair.row(4, what, size, "≤ 1.2", f"products: chunks of {CHUNK} into one buffer")


def some(model, inputs) -> Row:
    """Three layers at sixteen image tokens: only those are read."""
    tokens, layers = inputs.positions("image")[:16].tolist(), [0, model.cfg.n_layers // 2, model.cfg.n_layers]
    pair = interleaved(
        lambda: logit_lens(model, inputs, tokens, layers=layers),
        lambda: transformer_lens_logit_lens(model, inputs, positions=tokens, layers=layers, top_k=5),
        n=5,
    )
    what = "lens of 3 layers × 16 image tokens, model run included / TransformerLens's own"
    return pair.row(0, what, geometries.describe("medium", inputs) + f", {D_VOCAB} tokens in the vocabulary")


@torch.no_grad()
def products(model, normalized) -> None:
    """The arithmetic no lens can do without."""
    out = torch.empty(CHUNK, model.W_U.shape[1], device=normalized.device)
    for part in normalized.split(CHUNK):
        torch.mm(part, model.W_U, out=out[: len(part)])


@torch.no_grad()
def memory(image_tokens: int) -> Iterator[Row]:
    """The lens with its run, and above the run without logits that it cannot do without."""
    give_back_at_once()
    model = wide_model()
    inputs = model.encode(geometries.prompt(model, image_tokens))
    run, lens = lambda: model(inputs, return_type=None), lambda: logit_lens(model, inputs, "image")
    run(), lens()
    alone, peak = (max(extra_memory(call) for _ in range(3)) for call in (run, lens))
    vectors = len(inputs.positions("image")) * (model.cfg.n_layers + 1)
    stack, logits = (vectors * width * 4 / MIB for width in (model.cfg.d_model, D_VOCAB))
    size = f"{geometries.describe('medium', inputs)}, {D_VOCAB} tokens in the vocabulary"
    note = f"256 MB; of it {stack:.0f} the residual stream asked for; all logits would be {logits:.0f}"
    what = "lens, all image tokens × all layers: peak memory"
    yield Row(4, f"{what} above a run without logits", size, peak - alone, "MiB", goal=GOAL, note=note)
    yield Row(4, f"{what}, the run included", size, peak, "MiB", goal=GOAL, note=f"the run alone {alone:.0f}")


def counted() -> Iterator[Row]:
    """What the lens of the 2B model needs over 1,500 image tokens: its forward is minutes on a CPU."""
    stack, logits = 1500 * 29 * 1536 * 2, (CHUNK + 4) * D_VOCAB * 4
    widened = 4096 * 1536 * 4
    yield Row(4, "the same, counted from sizes (residual stream + buffers)", "2b, 1500 image tokens",
               (stack + logits + widened) / MIB, "MiB", goal=GOAL, note="above the run's own activations")  # fmt: skip


if __name__ == "__main__":
    report("lens", times, counted, *(partial(memory, tokens) for tokens in ((80,) if QUICK else (300, 1500))))
