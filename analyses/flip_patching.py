"""Where an answer flips: how much each head and the MLP of the flip's block contribute to it, and whether they cause it.

A flip at layer l, where the top-1 changes from token b to token a, is made by block l−1: h_l is the residual stream after it.
With u = W_U[a] − W_U[b], γ the final norm's weight, r = rms(h) and LD_l = z_l(a) − z_l(b):

    LD_l − LD_{l−1} = Σ_c (γ ⊙ c / r_l) · u + LD_{l−1} (r_{l−1} / r_l − 1)          exactly,

where c runs over what block l−1 adds to the stream: each head's output, the attention's output bias and the MLP's output.

1. Direct attribution: the terms of that sum (`attribute_flip`).
2. Causal effect of each component, at the answer's position, on the final logit difference: its output is patched in from
   a counterfactual prompt, or ablated (set to 0) (`component_effects`).
3. Test of the ranking (`ablate_flip`): ablate the components with the highest attribution, and for comparison several random
   sets with as many heads and MLPs, from blocks 0..l−1. The flip is *removed* if the logit lens at layer l no longer
   prefers a to b, and *reversed at the output* if the final logit difference changes sign.

Source: our own method (docs/methods.md); direct attribution as in TransformerLens; ablation as in Wang et al. 2022 (IOI).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.common.result import Result
from analyses.common.vocabulary import logits_of
from analyses.patching import patch_sweep
from hooked_qwen2vl.geometry import Place
from hooked_qwen2vl.moved import renamed_arguments, renamed_attributes
from hooked_qwen2vl.protocols import Model


class Component(NamedTuple):
    """A head of a block, or its MLP (then `head` is None)."""

    layer: int
    head: int | None

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}" if self.head is not None else f"L{self.layer}MLP"


@renamed_attributes
@dataclass(frozen=True)
class FlipAttribution(Result):
    """The direct attribution of one flip; all values are logit differences z(a) − z(b).

    Attributes:
        flip_layer: l, the first layer that prefers a. gained, lost: tokens a and b, as text. gained_id, lost_id: their ids.
        before, after: LD_{l−1} and LD_l.
        heads: [head] contribution of each head of block l−1. bias: of the attention's output bias. mlp: of the MLP.
            norm: of the change of the norm's scale, LD_{l−1} (r_{l−1} / r_l − 1).
        position: where the logit lens is read. row: the prompt of the batch.
    """

    flip_layer: int
    gained: str
    lost: str
    gained_id: int
    lost_id: int
    before: float
    after: float
    heads: Float[Tensor, "head"]
    bias: float
    mlp: float
    norm: float
    position: int
    row: int = 0

    @property
    def block(self) -> int:
        """The block that made the flip: l − 1."""
        return self.flip_layer - 1

    @property
    def total(self) -> float:
        """Sum of all contributions: `after − before` up to rounding."""
        return float(self.heads.sum()) + self.bias + self.mlp + self.norm

    def ranked(self) -> list[tuple[Component, float]]:
        """Heads and MLP, the largest contribution first."""
        parts = [(Component(self.block, head), float(value)) for head, value in enumerate(self.heads)]
        return sorted([*parts, (Component(self.block, None), self.mlp)], key=lambda part: -part[1])

    def to_dataframe(self) -> pd.DataFrame:
        """One row per head or MLP, the largest contribution first; the last two rows are the bias and the norm."""
        rows = [(str(component), value) for component, value in self.ranked()]
        table = pd.DataFrame([*rows, ("bias", self.bias), ("norm", self.norm)], columns=["component", "attribution"])
        return table.assign(flip=f"{self.lost} → {self.gained}", layer=self.flip_layer)

    def plot(self, path: Any = None) -> Any:
        """The contributions, the largest first."""
        from analyses.views.experiments import attribution_plot

        return attribution_plot(self, path)


@renamed_attributes
@dataclass(frozen=True)
class FlipTest:
    """What happens to a flip when the components found by attribution are ablated, compared with random ones.

    Attributes:
        components: the components found. lens_difference, final_difference: LD_l and LD_L without any ablation.
        ablated: (LD_l, LD_L) with the components set to 0. random: [draw 2] the same for random components.
    """

    attribution: FlipAttribution
    components: tuple[Component, ...]
    lens_difference: float
    final_difference: float
    ablated: tuple[float, float]
    random: Float[Tensor, "draw 2"]

    @property
    def removed(self) -> bool:
        """Whether the logit lens at the flip's layer no longer prefers a once the components are ablated."""
        return self.ablated[0] <= 0

    @property
    def reversed(self) -> bool:
        """Whether the final logit difference changes sign once the components are ablated."""
        return self.ablated[1] * self.final_difference < 0

    @property
    def removed_by_random(self) -> float:
        """Share of random draws that remove the flip."""
        return float((self.random[:, 0] <= 0).float().mean())

    @property
    def reversed_by_random(self) -> float:
        """Share of random draws that reverse the output."""
        return float((self.random[:, 1] * self.final_difference < 0).float().mean())

    def summary(self) -> dict[str, Any]:
        """One row for a table."""
        flip = self.attribution
        return {
            "layer": flip.flip_layer,
            "lost": flip.lost,
            "gained": flip.gained,
            "change": flip.after - flip.before,
            "attribution_error": abs(flip.total - (flip.after - flip.before)),
            "components": " ".join(map(str, self.components)),
            "lens_difference": self.lens_difference,
            "lens_difference_ablated": self.ablated[0],
            "final_difference": self.final_difference,
            "final_difference_ablated": self.ablated[1],
            "removed": self.removed,
            "removed_by_random": self.removed_by_random,
            "reversed": self.reversed,
            "reversed_by_random": self.reversed_by_random,
        }


@renamed_arguments
@torch.no_grad()
def attribute_flip(
    model: Model, inputs: Any, layer: int, gained: int, lost: int, position: Place = "last", row: int = 0
) -> FlipAttribution:
    """The exact direct attribution of the flip at layer l to the components of block l−1.

    Args:
        layer: l in 1..L. gained, lost: token ids a and b.
        position: where the logit lens is read: a place that is one position (see `Inputs.resolve`).
    Raises:
        ValueError: a layer outside 1..L, or an image token's position and a block after which DeepStack adds to image tokens
            (Qwen3-VL): what it adds is not part of the block.
    """
    if not 1 <= layer <= model.cfg.n_layers:
        raise ValueError(f"a flip is made by a block: its layer must be in 1..{model.cfg.n_layers}, got {layer}.")
    block, at = layer - 1, inputs.position(position, row)
    merged = len(model.cfg.vision.deepstack_layers)
    if block < merged and inputs.token_types[row, at] > 0:
        raise ValueError(
            f"position {at} is an image token, to which DeepStack adds after each of blocks 0..{merged - 1}: a flip there is not block "
            f"{block}'s alone. Read a text position, or a layer from {merged + 1} on."
        )
    names = [f"blocks.{block}.{name}" for name in ("hook_resid_pre", "attn.hook_z", "hook_mlp_out", "hook_resid_post")]
    _, cache = model.run_with_cache(inputs, names_filter=names, stop_at_layer=layer)
    pre, z, mlp, post = (cache[name][row, at].cpu().double() for name in names)
    direction = _direction(model, gained, lost)
    r_pre, r_post = (_rms(model, h) for h in (pre, post))
    before, after = (float(h @ direction / r) for h, r in ((pre, r_pre), (post, r_post)))
    heads = torch.einsum("hd,hdm,m->h", z, model.blocks[block].attn.W_O.cpu().double(), direction) / r_post
    return FlipAttribution(
        flip_layer=layer,
        gained=model.tokenizer.decode([gained]),
        lost=model.tokenizer.decode([lost]),
        gained_id=gained,
        lost_id=lost,
        before=before,
        after=after,
        heads=heads.float(),
        bias=float(model.blocks[block].attn.b_O.cpu().double() @ direction / r_post),
        mlp=float(mlp @ direction / r_post),
        norm=float(before * (r_pre / r_post - 1)),
        position=at,
        row=row % len(inputs),
    )


@torch.no_grad()
def component_effects(model: Model, inputs: Any, flip: FlipAttribution, counterfactual: Any = None) -> pd.DataFrame:
    """For each component of the flip's block: its direct attribution and its causal effect on the final logit difference.

    Args:
        inputs: the prompts in which the flip was attributed. counterfactual: prompts of the same shape, whose activations
            are patched in; None leaves that column out.
    Returns:
        one row per component: component, attribution, and the change of z_L(a) − z_L(b) when the component's output at the
        flip's position is set to 0 (`ablated`) or replaced by the counterfactual's (`patched`).
    """
    inputs = _its_row(model, inputs, flip)
    base = _differences(model, inputs, flip, [])[1]
    table = pd.DataFrame([(c, value) for c, value in flip.ranked()], columns=["component", "attribution"])
    table["ablated"] = [_differences(model, inputs, flip, [c])[1] - base for c in table["component"]]
    if counterfactual is not None:
        effect = _patched(model, inputs, flip, _its_row(model, counterfactual, flip))
        table["patched"] = [effect[c] - base for c in table["component"]]
    return table.assign(component=table["component"].map(str))


@torch.no_grad()
def ablate_flip(model: Model, inputs: Any, flip: FlipAttribution, n_components: int = 2, n_random: int = 10, seed: int = 0) -> FlipTest:
    """Ablates the components with the highest attribution and, as a control, random ones of the same kinds.

    Args:
        n_components: the largest number of components to ablate; only those with a positive attribution are taken.
        n_random: number of random draws. seed: of the draws.
    """
    inputs = _its_row(model, inputs, flip)
    found = [component for component, value in flip.ranked() if value > 0][:n_components]
    rng = Random(f"{seed} {flip.flip_layer} {flip.gained_id} {flip.lost_id}")
    draws = [_differences(model, inputs, flip, _random_like(model, found, flip.block, rng)) for _ in range(n_random)]
    at_layer, final = _differences(model, inputs, flip, [])
    return FlipTest(flip, tuple(found), at_layer, final, _differences(model, inputs, flip, found), torch.tensor(draws))


def ablation_hooks(components: Sequence[Component], position: int) -> list[tuple[str, Callable]]:
    """Hooks that set the outputs of components to 0 at one position."""

    def of_head(head: int) -> Callable:
        def zero(z: Float[Tensor, "batch pos head d_head"], hook: Any) -> Tensor:
            z[:, position, head] = 0.0
            return z

        return zero

    def of_mlp(out: Float[Tensor, "batch pos d_model"], hook: Any) -> Tensor:
        out[:, position] = 0.0
        return out

    return [
        (f"blocks.{layer}.hook_mlp_out", of_mlp) if head is None else (f"blocks.{layer}.attn.hook_z", of_head(head))
        for layer, head in components
    ]


def _its_row(model: Model, inputs: Any, flip: FlipAttribution) -> Any:
    """The prompt in which the flip was attributed, encoded: that row of a batch, or the only row."""
    return model.encode(inputs if len(inputs) == 1 else inputs.row(flip.row))


def _differences(model: Model, inputs: Any, flip: FlipAttribution, ablated: Sequence[Component]) -> tuple[float, float]:
    """(LD at the flip's layer, LD at the output), with some components set to 0."""
    stream = {}
    keep = (f"blocks.{flip.block}.hook_resid_post", lambda x, hook: stream.update(post=x[:, flip.position : flip.position + 1]))
    hooks = [*ablation_hooks(ablated, flip.position), keep]
    logits = model.run_with_hooks(inputs, fwd_hooks=hooks, logits_at=flip.position)
    at_layer = logits_of(model, stream["post"][:, 0])  # as the lens reads it: in float32, whatever the weights' dtype
    at_layer, final = (float(z[flip.gained_id] - z[flip.lost_id]) for z in (at_layer[0], logits[0, 0].float()))
    return at_layer, final


def _patched(model: Model, inputs: Any, flip: FlipAttribution, counterfactual: Any) -> dict[Component, float]:
    """Final logit difference with each component patched in from the counterfactual (`patch_sweep`)."""
    place = {"layers": [flip.block], "positions": [flip.position], "metric_position": flip.position, "progress": False}

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, flip.gained_id] - logits[:, -1, flip.lost_id]

    heads, mlp = (patch_sweep(model, counterfactual, inputs, metric, kind, **place) for kind in ("z", "mlp_out"))
    values = {Component(flip.block, head): float(value) for head, value in enumerate(heads.values.flatten())}
    return values | {Component(flip.block, None): float(mlp.values)}


def _random_like(model: Model, found: Sequence[Component], layer: int, rng: Random) -> list[Component]:
    """Random components of blocks 0..layer, as many heads and MLPs as were found, and none of those found."""
    heads = [Component(l, h) for l in range(layer + 1) for h in range(model.cfg.n_heads)]
    mlps = [Component(l, None) for l in range(layer + 1)]
    drawn = []
    for pool, wanted in ((heads, [c for c in found if c.head is not None]), (mlps, [c for c in found if c.head is None])):
        others = [component for component in pool if component not in found]
        drawn += rng.sample(others, min(len(wanted), len(others)))
    return drawn


def _direction(model: Model, gained: int, lost: int) -> Float[Tensor, "d_model"]:
    """γ ⊙ (W_U[a] − W_U[b]) in float64, on the CPU (a Mac's GPU has no float64)."""
    gained_row, lost_row, weight = (tensor.cpu().double() for tensor in (model.W_U[:, gained], model.W_U[:, lost], model.ln_final.w))
    return (gained_row - lost_row) * weight


def _rms(model: Model, h: Float[Tensor, "d_model"]) -> Tensor:
    return (h.pow(2).mean() + model.ln_final.eps).sqrt()
