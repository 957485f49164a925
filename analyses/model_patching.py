"""Cross-model activation patching: where does fine-tuning change what is computed?

1. Two models of one shape, such as a base model and its fine-tuned version (LoRA merged into the weights, or full), run on the
   same prompts; each encodes the images with its own vision tower.
2. At each hook point, and for each span of positions, the source's activation is patched into the target's run.
3. explained = 1 − KL(p_source ‖ p_patched) / KL(p_source ‖ p_target), at the last position: 0 if the patch changes
   nothing, 1 if the target now predicts what the source predicts.

Patching the residual stream at all positions gives the source's logits exactly after the last block that differs between the
models, and changes nothing before the first one. Source: Prakash et al. 2024 (cross-model activation patching); `explained` is
our measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.utilities import get_act_name

from analyses.common.result import Result
from hooked_qwen2vl.geometry import Place
from hooked_qwen2vl.segments import is_segment_name

ACTIVATIONS = ("resid_pre", "attn_out", "mlp_out")
_EPSILON = 1e-6  # nats; prompts with a smaller KL between the two models are skipped


@dataclass(frozen=True)
class ModelPatching(Result):
    """Effects of patching one model's activations into another.

    Attributes:
        explained: [place span item]; NaN for items without such a span.
        same_top: [place span item] 1 if the patched run's most probable token is the source's, else 0; NaN as in `explained`.
        difference: [item] KL(p_source ‖ p_target), nats.
        top_agrees: [item] 1 if source and unpatched target have the same most probable token, else 0.
        places: hook names. spans: as given. activation: what was patched.
        skipped: number of prompts left out because the two models agree on them.
        source_name, target_name: names of the models.
    """

    explained: Float[Tensor, "place span item"]
    same_top: Float[Tensor, "place span item"]
    difference: Float[Tensor, "item"]
    top_agrees: Float[Tensor, "item"]
    places: tuple[str, ...]
    spans: tuple[str, ...]
    activation: str
    skipped: int
    source_name: str
    target_name: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row per place and span: means over items, and the number of items."""
        return pd.DataFrame(
            {
                "place": place,
                "span": span,
                "explained": float(self.explained[i, j].nanmean()),
                "same_top": float(self.same_top[i, j].nanmean()),
                "same_top_unpatched": float(self.top_agrees[~self.explained[i, j].isnan()].mean()),
                "items": int((~self.explained[i, j].isnan()).sum()),
            }
            for i, place in enumerate(self.places)
            for j, span in enumerate(self.spans)
        )

    def plot(self, path: Any = None) -> Any:
        """`explained` of each span by place."""
        from analyses.views.compare import model_patching_plot

        return model_patching_plot(self, path)


@torch.no_grad()
def patch_between_models(
    source: Any,
    target: Any,
    prompts: Sequence[Any],
    activation: str = "resid_pre",
    spans: Sequence[Place] = ("all", "image", "question", "last"),
    progress: bool = True,
) -> ModelPatching:
    """Patches the source's activations into the target's run, one place and one span at a time.

    Args:
        source, target: HookedQwen2VLs of one shape.
        prompts: `Inputs` of one row each, from either model's `to_inputs` (their processors must agree).
        activation: one of ACTIVATIONS; with "resid_pre" the stream after the last block is patched, too.
        spans: "all", or places (see `Inputs.resolve`). A segment may be missing in some prompts, which then have NaN.
    Raises:
        ValueError: models of different shapes, an unknown activation, no prompts, a prompt of several rows, a place that is
            in no prompt, or models that agree on every prompt.
    """
    _check(source, target, prompts, activation)
    names = [get_act_name(activation, layer) for layer in range(target.cfg.n_layers)]
    if activation == "resid_pre":
        names.append(get_act_name("resid_post", target.cfg.n_layers - 1))
    for span in spans:
        if all(_places(prompt, span) is None for prompt in prompts):
            raise ValueError(f"no prompt has a segment called {span!r}; the first has {', '.join(prompts[0].segment_names())}.")
    explained, same_top, difference, agrees, skipped = [], [], [], [], 0
    for prompt in tqdm(prompts, desc="models", unit="prompt", disable=not progress, delay=2):
        ours, cache = source.run_with_cache(source.encode(prompt), names_filter=names, logits_at=-1)
        prompt = target.encode(prompt)
        wanted, plain = _log_probs(ours), _log_probs(target(prompt, logits_at=-1))
        gap = _divergence(wanted, plain)
        if gap < _EPSILON:
            skipped += 1
            continue
        cells = torch.full((2, len(names), len(spans)), float("nan"))
        for j, places in enumerate(_places(prompt, span) for span in spans):
            for i, name in enumerate(names if places is not None else ()):
                logits = target.run_with_hooks(prompt, fwd_hooks=[(name, _put(cache[name], cast(Any, places)))], logits_at=-1)
                patched = _log_probs(logits)
                cells[:, i, j] = torch.tensor([1 - _divergence(wanted, patched) / gap, wanted.argmax() == patched.argmax()])
        explained.append(cells[0]), same_top.append(cells[1])
        difference.append(gap), agrees.append(float(wanted.argmax() == plain.argmax()))
    if not explained:
        raise ValueError(f"the two models agree to {_EPSILON} nats on all of {len(prompts)} prompts: nothing to explain.")
    return ModelPatching(
        torch.stack(explained, -1), torch.stack(same_top, -1), torch.tensor(difference), torch.tensor(agrees),
        tuple(names), cast(Any, tuple(spans)), activation, skipped, str(source.cfg.model_name), str(target.cfg.model_name),
    )  # fmt: skip


def _check(source: Any, target: Any, prompts: Sequence[Any], activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
    for number in ("n_layers", "d_model", "d_vocab"):
        ours, theirs = getattr(source.cfg, number), getattr(target.cfg, number)
        if ours != theirs:
            raise ValueError(f"activations cannot move between models of other shapes: {number} is {ours} and {theirs}.")
    if not prompts or any(len(prompt) != 1 for prompt in prompts):
        raise ValueError("expected one or more prompts of one row each: pass [inputs[row] for row in range(len(inputs))].")


def _places(prompt: Any, span: Place) -> Tensor | None:
    """Positions of a span; None if it is a segment that this prompt does not have."""
    if isinstance(span, str) and is_segment_name(span) and not prompt.has_segment(span):
        return None
    return prompt.resolve(slice(None) if isinstance(span, str) and span == "all" else span)


def _put(clean: Float[Tensor, "1 pos d_model"], places: Tensor) -> Any:
    def hook(activation: Tensor, hook: Any) -> Tensor:
        activation[:, places] = clean[:, places].to(activation)
        return activation

    return hook


def _log_probs(logits: Float[Tensor, "1 1 d_vocab"]) -> Float[Tensor, "d_vocab"]:
    return logits[0, 0].cpu().double().log_softmax(-1)


def _divergence(p: Float[Tensor, "d_vocab"], q: Float[Tensor, "d_vocab"]) -> float:
    """KL(p ‖ q) in nats, of two vectors of log-probabilities."""
    return float((p.exp() * (p - q)).sum())
