"""Interventions on heads, neurons, layers, directions and image tokens, in any run of the model.

Each function returns a list of (hook name, function). Lists can be added; their hooks act in order:

    hooks = ablate(heads=[(3, 1)]) + steer(direction, layers=[4], scale=2.0)
    with model.hooks(fwd_hooks=hooks): ...          or          with hooks.on(model): ...
    model.generate(inputs, fwd_hooks=hooks)

1. They act alike in plain runs, runs with a cache, patching sweeps, and generation with or without a key-value cache.
   `positions` belong to the prompts that the interventions were made for; running prompts of another layout is an error.
2. Without `positions` they act at every position, generated ones included. With `positions` they act at these positions of
   the prompt, and with `generated=True` also at every generated position.
3. Zero ablation of a head, a neuron, or a whole attention or MLP equals setting its output weights to zero.

Sources: mean and resample ablation: Chan et al. 2022 (causal scrubbing); steering: Turner et al. 2023, Rimsky et al. 2024;
projecting out: Arditi et al. 2024; dropping image tokens: Chen et al. 2024 (FastV).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_qwen2vl.geometry import Place, PromptShape
from hooked_qwen2vl.layers import require_prompt
from hooked_qwen2vl.protocols import Model
from hooked_qwen2vl.running import attention_positions, query_positions, running_positions

How = Literal["zero", "mean", "resample"]
Edit = Callable[..., Tensor]
_DRAWS = 65_536  # positions after which resampling repeats its random draws


class Interventions(list):
    """A list of (hook name, function); lists can be added, and `with hooks.on(model):` runs the model with them."""

    def __add__(self, other: Any) -> Interventions:
        return Interventions([*self, *other])

    def __radd__(self, other: Any) -> Interventions:
        return Interventions([*other, *self])

    @contextmanager
    def on(self, model: Model) -> Iterator[Any]:
        """Context in which the model runs with these interventions."""
        with model.hooks(fwd_hooks=self):
            yield model


# ---- where --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Where:
    """The positions that an intervention acts on.

    Attributes:
        rows: [row pos] mask over the prompts; None: every position.
        shape: layout of those prompts. generated: whether it also acts at every generated position.
        what: subject of error messages, such as "these interventions were".
    """

    rows: Bool[Tensor, "row pos"] | None = None
    shape: PromptShape | None = None
    generated: bool = False
    what: str = "these interventions were"

    @classmethod
    def of(cls, inputs: Any, positions: Place | None, generated: bool = False) -> Where:
        """The positions of a place in every row of the prompts.

        Raises:
            ValueError: positions without prompts, prompts or `generated` without positions, or a place that a row does not have.
        """
        if positions is None:
            if generated:
                raise ValueError("generated=True goes with positions=: without them every position counts, generated ones too.")
            if inputs is not None:
                raise ValueError("inputs= goes with positions=: without them every position of whatever is run counts. Drop inputs=.")
            return cls()
        if inputs is None:
            raise ValueError("positions= are places in a prompt: pass inputs=, the prompt that you will run.")
        rows = torch.zeros(inputs.shape, dtype=torch.bool)
        for row in range(len(inputs)):
            rows[row, inputs.resolve(positions, row).cpu()] = True
        return cls(rows, inputs.prompt_shape, generated)

    def mask(self, activation: Float[Tensor, "batch pos *rest"], hook: Any) -> Bool[Tensor, "batch pos"] | None:
        """At which of an activation's positions to act; None: at all.

        Raises:
            ValueError: the prompts that run have another layout, or it is unknown which positions of the prompts these are.
        """
        return None if self.rows is None else self.at(query_positions(activation.shape[1]), len(activation), hook).to(activation.device)

    def at(self, positions: Tensor, batch: int, hook: Any) -> Bool[Tensor, "batch n"]:
        """At which of these positions to act, for every row of a batch (which may repeat the prompts several times)."""
        require_prompt(self.shape, hook, self.what)
        assert self.rows is not None
        if running_positions.get() is None and len(positions) < self.rows.shape[1]:
            raise ValueError(
                f"{hook.name} holds {len(positions)} positions and the prompt has {self.rows.shape[1]}: which ones they are is known "
                f"only in runs of a HookedQwen2VL; leave positions=None on other models, or run the whole prompt."
            )
        if batch % len(self.rows):
            raise ValueError(
                f"{hook.name}: {batch} rows are run, the intervention was made for {len(self.rows)}; make it of the same prompts."
            )
        rows = torch.full((len(self.rows), len(positions)), self.generated)
        inside = positions < self.rows.shape[1]
        rows[:, inside] = self.rows[:, positions[inside]]
        return rows.repeat(batch // len(self.rows), 1)


# ---- ablation -----------------------------------------------------------------------------------


def ablate(
    heads: Sequence[tuple[int, int]] = (),
    neurons: Sequence[tuple[int, int]] = (),
    attentions: Sequence[int] = (),
    mlps: Sequence[int] = (),
    layers: Sequence[int] = (),
    positions: Place | None = None,
    inputs: Any = None,
    how: How = "zero",
    reference: Any = None,
    seed: int = 0,
    generated: bool = False,
) -> Interventions:
    """Zero, mean or resample ablation of heads, neurons, attentions, MLPs, layers or tokens of the decoder.

    Args:
        heads: (layer, head), at `attn.hook_z`. neurons: (layer, neuron), at `mlp.hook_post`.
        attentions, mlps: layers whose attention or MLP output is replaced. layers: layers where both are.
        positions: where in the prompt; None: everywhere. With positions and no heads, neurons, attentions, mlps or layers, the
            tokens are ablated: the residual stream that enters the first block, and what DeepStack adds later (Qwen3-VL).
        inputs: the prompts that `positions` belong to.
        how: "zero"; "mean": the mean over all tokens of `reference`; "resample": the value at one token of the reference, drawn
            for each position from the seed; all ablated parts take the same token.
        reference: a cache (`model.run_with_cache(prompts, names_filter=hook_names(…))`) for "mean" and "resample"; padding is not used.
        generated: with positions, also ablate at every generated position.
    Raises:
        ValueError: nothing to ablate, a reference that is missing, not needed or lacks an activation; when run: no such layer, head
            or neuron, or prompts of another layout than `inputs`.
    """
    if how not in ("zero", "mean", "resample"):
        raise ValueError(f"how must be 'zero', 'mean' or 'resample', got {how!r}.")
    if (reference is None) != (how == "zero"):
        need = "needs no reference=: drop it" if how == "zero" else "needs reference=, a cache of prompts that the values are taken from"
        raise ValueError(f"how={how!r} {need}.")
    where, source = Where.of(inputs, positions, generated), _Source(how, reference, seed)
    parts = _parts(heads, neurons, [*attentions, *layers], [*mlps, *layers])
    if not parts and positions is None:
        raise ValueError("there is nothing to ablate: name heads, neurons, attentions, mlps, layers or positions.")
    if not parts:
        edit = _replacing(None, where, source)
        return Interventions([("blocks.0.hook_resid_pre", edit), (_is_deepstack, edit)])
    return Interventions((name, _replacing(units, where, source)) for name, units in parts.items())


def hook_names(
    heads: Sequence[tuple[int, int]] = (),
    neurons: Sequence[tuple[int, int]] = (),
    attentions: Sequence[int] = (),
    mlps: Sequence[int] = (),
    layers: Sequence[int] = (),
) -> list[str]:
    """The hook points at which `ablate` acts on these parts; a reference must have them."""
    return list(_parts(heads, neurons, [*attentions, *layers], [*mlps, *layers]))


def _is_deepstack(name: str) -> bool:
    return name.endswith("hook_deepstack")


def _parts(heads: Any, neurons: Any, attentions: Any, mlps: Any) -> dict[str, list[int] | None]:
    """Hook name -> heads or neurons to replace there; None: the whole activation."""
    parts: dict[str, list[int] | None] = {}
    for pairs, name in ((heads, "attn.hook_z"), (neurons, "mlp.hook_post")):
        for layer, unit in pairs:
            parts.setdefault(f"blocks.{layer}.{name}", []).append(int(unit))
    parts |= {f"blocks.{layer}.hook_attn_out": None for layer in attentions}
    return parts | {f"blocks.{layer}.hook_mlp_out": None for layer in mlps}


class _Source:
    """The values that replace the ablated activations."""

    def __init__(self, how: How, reference: Any, seed: int):
        self.how, self.reference = how, reference
        self.drawn = np.random.default_rng(seed).random(_DRAWS)
        self.known: dict[str, Tensor] = {}

    def values(self, name: str, positions: Tensor) -> Tensor | float:
        """Values for one hook point: [pos …] for these positions, or […] or a number for all positions."""
        if self.how == "zero":
            return 0.0
        tokens = self._tokens(name)
        if self.how == "mean":
            return tokens.cpu().double().mean(0)
        return tokens[(self.drawn[positions.numpy() % _DRAWS] * len(tokens)).astype(int)]

    def _tokens(self, name: str) -> Float[Tensor, "token *rest"]:
        if name not in self.known:
            try:
                values = self.reference[name]
            except KeyError:
                raise ValueError(
                    f"the reference has no {name}: cache it with model.run_with_cache(prompts, names_filter=hook_names(…))."
                ) from None
            shape = getattr(self.reference, "prompt_shape", None)
            if shape is not None and shape.sliced:
                raise ValueError("the reference was cached with pos_slice=: pass a cache of whole prompts.")
            real = torch.ones(values.shape[:2], dtype=torch.bool) if shape is None else shape.attention_mask.bool()
            self.known[name] = values[real.to(values.device)]
        return self.known[name]


def _replacing(units: list[int] | None, where: Where, source: _Source) -> Edit:
    def edit(activation: Float[Tensor, "batch pos *rest"], hook: Any) -> Tensor:
        values = source.values(hook.name, query_positions(activation.shape[1]))
        values = torch.as_tensor(values, dtype=activation.dtype, device=activation.device)
        if units is None:
            return _blend(values.expand_as(activation), activation, where.mask(activation, hook))
        _require_units(units, activation, hook)
        if values.ndim:
            of_position = values.ndim == activation.ndim - 1
            values = values[:, units] if of_position else values[units]
        chosen = activation[:, :, units]
        edited = activation.clone()
        edited[:, :, units] = _blend(values.expand_as(chosen), chosen, where.mask(activation, hook))
        return edited

    return edit


def _require_units(units: Sequence[int], activation: Tensor, hook: Any) -> None:
    kind, n = ("head", activation.shape[2]) if activation.ndim == 4 else ("neuron", activation.shape[2])
    if wrong := [unit for unit in units if not 0 <= unit < n]:
        raise ValueError(f"{hook.name} has {kind}s 0..{n - 1}, got {', '.join(map(str, wrong))}.")


def _blend(new: Tensor, old: Tensor, mask: Bool[Tensor, "batch pos"] | None) -> Tensor:
    return new if mask is None else torch.where(mask[(...,) + (None,) * (old.ndim - 2)], new, old)


def scale_heads(
    factors: Mapping[tuple[int, int], float], positions: Place | None = None, inputs: Any = None, generated: bool = False
) -> Interventions:
    """Multiplies the outputs of heads (`attn.hook_z`) by factors: 0 is zero ablation, 1 changes nothing.

    Args:
        factors: (layer, head) -> factor. positions, inputs, generated: see `ablate`.
    Raises:
        ValueError: no heads given, or as `ablate`.
    """
    where, layers = Where.of(inputs, positions, generated), dict[int, dict[int, float]]()
    for (layer, head), factor in factors.items():
        layers.setdefault(layer, {})[head] = float(factor)
    if not layers:
        raise ValueError("there is nothing to scale: name heads, as {(layer, head): factor}.")

    def scaling(of_layer: dict[int, float]) -> Edit:
        heads = list(of_layer)

        def edit(z: Float[Tensor, "batch pos head d_head"], hook: Any) -> Tensor:
            _require_units(heads, z, hook)
            by = torch.tensor(list(of_layer.values()), dtype=z.dtype, device=z.device)[:, None]
            edited = z.clone()
            edited[:, :, heads] = _blend(z[:, :, heads] * by, z[:, :, heads], where.mask(z, hook))
            return edited

        return edit

    return Interventions((f"blocks.{layer}.attn.hook_z", scaling(of_layer)) for layer, of_layer in layers.items())


# ---- directions ---------------------------------------------------------------------------------


def steer(
    direction: Float[Tensor, "d_model"] | Float[Tensor, "layer d_model"],
    layers: Sequence[int],
    positions: Place | None = None,
    scale: float = 1.0,
    inputs: Any = None,
    generated: bool = False,
) -> Interventions:
    """Adds `scale` times a direction to the residual stream that enters some blocks.

    Args:
        direction: one for all `layers`, or one for each (see `contrast_direction`, `token_direction`).
        layers: blocks 0..L−1.
        positions, inputs, generated: see `ablate`.
    Raises:
        ValueError: no layers given, a direction of another size than d_model or not finite, or as `ablate`.
    """

    def add(vector: Tensor) -> Edit:
        def edit(stream: Float[Tensor, "batch pos d_model"], hook: Any) -> Tensor:
            return _blend(stream + scale * _fitting(vector, stream, hook).to(stream.dtype), stream, where.mask(stream, hook))

        return edit

    where = Where.of(inputs, positions, generated)
    return Interventions((f"blocks.{layer}.hook_resid_pre", add(vector)) for layer, vector in _for_each(direction, layers))


def project_out(
    direction: Float[Tensor, "d_model"] | Float[Tensor, "layer d_model"],
    layers: Sequence[int],
    positions: Place | None = None,
    inputs: Any = None,
    generated: bool = False,
) -> Interventions:
    """Projects a direction out of the residual stream that enters some blocks: h − ⟨h, d⟩ d / ⟨d, d⟩.

    Computed in float32 (float64 for a float64 stream). `project_away` does this only where ⟨h, d⟩ is positive. Arguments and errors
    as `steer`; a direction of length 0 is an error, too.
    """

    def remove(vector: Tensor) -> Edit:
        def edit(stream: Float[Tensor, "batch pos d_model"], hook: Any) -> Tensor:
            wide = torch.float64 if stream.dtype == torch.float64 else torch.float32
            h, d = stream.to(wide), _fitting(vector, stream, hook).to(wide)
            without = h - (h @ d / (d @ d))[..., None] * d
            return _blend(without.to(stream.dtype), stream, where.mask(stream, hook))

        return edit

    where, pairs = Where.of(inputs, positions, generated), _for_each(direction, layers)
    if not all(bool(vector.norm() > 0) for _, vector in pairs):
        raise ValueError("the direction is the zero vector: there is nothing to take out.")
    return Interventions((f"blocks.{layer}.hook_resid_pre", remove(vector)) for layer, vector in pairs)


def _for_each(direction: Tensor, layers: Sequence[int]) -> list[tuple[int, Tensor]]:
    layers, direction = [int(layer) for layer in layers], direction.detach()
    vectors = direction.expand(len(layers), -1) if direction.ndim == 1 else direction
    if not layers or vectors.ndim != 2 or len(vectors) != len(layers):
        raise ValueError(
            f"expected a direction [d_model] and at least one layer, or a direction for each of {len(layers)} layers, got "
            f"{tuple(direction.shape)}."
        )
    if not bool(vectors.isfinite().all()):
        raise ValueError("the direction has numbers that are not finite.")
    return list(zip(layers, vectors))


def _fitting(vector: Tensor, stream: Tensor, hook: Any) -> Tensor:
    if len(vector) != stream.shape[-1]:
        raise ValueError(f"{hook.name} has {stream.shape[-1]} dimensions, the direction {len(vector)}.")
    return vector.to(stream.device)


@torch.no_grad()
def contrast_direction(model: Model, positive: Any, negative: Any, layer: int, where: Place = "last") -> Float[Tensor, "d_model"]:
    """Difference of means of the residual stream that enters a block: mean over `positive` minus mean over `negative` prompts.

    Args:
        positive, negative: `Inputs`, any number of prompts each, with or without images. layer: the block, 0..L−1.
        where: a place in every prompt; the stream is averaged over its positions, then over prompts.
    Raises:
        ValueError: no such layer or place.
    """
    if not 0 <= layer < model.cfg.n_layers:
        raise ValueError(f"layer must be a block in 0..{model.cfg.n_layers - 1}, got {layer}.")
    means = []
    for prompts in (positive, negative):
        prompts = model.as_inputs(prompts)
        stream = model(prompts, stop_at_layer=layer) if layer else model(prompts, stop_at_layer=0)
        rows = [stream[row, prompts.resolve(where, row)].cpu().double().mean(0) for row in range(len(prompts))]
        means.append(torch.stack(rows).mean(0))
    return (means[0] - means[1]).to(stream.dtype)


@torch.no_grad()
def token_direction(model: Model, token: str | int, against: str | int | None = None) -> Float[Tensor, "d_model"]:
    """The direction of the residual stream that raises a token's logit: its column of W_U times the final norm's weight.

    Args:
        against: another token; its direction is subtracted.
    Raises:
        ValueError: text that is not one token.
    """
    ids = [model.to_single_token(t) if isinstance(t, str) else int(t) for t in (token, against) if t is not None]
    directions = [model.ln_final.w * model.W_U[:, i] for i in ids]
    return directions[0].clone() if against is None else directions[0] - directions[1]


# ---- attention and image tokens -----------------------------------------------------------------


def redirect_attention(
    inputs: Any,
    heads: Sequence[tuple[int, int]],
    to: Place,
    share: float,
    positions: Place | None = None,
    generated: bool = True,
) -> Interventions:
    """Sets the share of their attention that heads give to a place of the prompt.

    The pattern is rescaled: the proportions among the tokens of the place, and among all other tokens, stay as they are. A head
    that gives the place no attention at all spreads the share evenly over it.

    Args:
        heads: (layer, head). to: the place attended to. share: 0..1 of each query's attention.
        positions: the queries; None: every position from the first token of `to` on (a query attends to the tokens of the place
            that it sees).
        generated: also change every generated position.
    Raises:
        ValueError: no heads given, a share outside 0..1, a query that sees no token of the place, or one that sees no other token
            (unless share = 1).
    """
    if not heads or not 0 <= share <= 1:
        raise ValueError(f"expected at least one head and a share in 0..1, got {len(heads)} heads and share={share}.")
    target = Where.of(inputs, to)
    if positions is None:
        firsts = [int(inputs.resolve(to, row).min()) for row in range(len(inputs))]
        after = torch.arange(inputs.shape[1])[None] >= torch.tensor(firsts)[:, None]
        queries = Where(after, inputs.prompt_shape, generated)
    else:
        queries = Where.of(inputs, positions, generated)

    def redirecting(of_layer: list[int]) -> Edit:
        def edit(pattern: Float[Tensor, "batch head pos key_pos"], hook: Any) -> Tensor:
            _require_units(of_layer, pattern.transpose(1, 2), hook)
            at, keys = attention_positions(*pattern.shape[-2:])
            rows = queries.at(at, len(pattern), hook).to(pattern.device)
            on = target.at(keys, len(pattern), hook)[:, None] & (keys[None, None] <= at[None, :, None])
            edited = pattern.clone()
            chosen = pattern[:, of_layer]
            redirected = _redirected(chosen, on[:, None].to(pattern.device), share, rows[:, None], hook)
            edited[:, of_layer] = torch.where(rows[:, None, :, None], redirected, chosen)
            return edited

        return edit

    layers: dict[int, list[int]] = {}
    for layer, head in heads:
        layers.setdefault(layer, []).append(head)
    return Interventions((f"blocks.{layer}.attn.hook_pattern", redirecting(of_layer)) for layer, of_layer in layers.items())


def _redirected(pattern: Tensor, on: Tensor, share: float, wanted: Tensor, hook: Any) -> Tensor:
    wide = pattern.double() if pattern.dtype == torch.float64 else pattern.float()
    there, rest = wide * on, wide * ~on
    total, other = there.sum(-1, keepdim=True), rest.sum(-1, keepdim=True)
    even = on / on.sum(-1, keepdim=True).clamp(min=1)
    unseen = wanted & ~on.any(-1)
    alone = wanted & (other[..., 0] <= 0) & (share < 1)
    if bool(unseen.any()) or bool(alone.any()):
        what = "sees no token of the place" if bool(unseen.any()) else "sees nothing but the place"
        raise ValueError(f"{hook.name}: a query {what}, so it cannot give it a share of {share}; choose other positions=.")
    there = torch.where(total > 0, there / total.clamp(min=torch.finfo(wide.dtype).tiny), even)
    return (share * there + (1 - share) * rest / other.clamp(min=torch.finfo(wide.dtype).tiny)).to(pattern.dtype)


def hide(inputs: Any, span: Place, layers: Sequence[int] | None = None) -> Interventions:
    """Hides tokens: no other token of the prompt and no generated token attends to them in these layers.

    The hidden tokens still attend to themselves and to one another.

    Args:
        layers: None: all layers.
    Raises:
        ValueError: no such place; when run: prompts of another layout.
    """
    where = Where.of(inputs, span)

    def edit(scores: Float[Tensor, "batch head pos key_pos"], hook: Any) -> Tensor:
        at, keys = attention_positions(*scores.shape[-2:])
        hidden, own = (where.at(places, len(scores), hook).to(scores.device) for places in (keys, at))
        blocked = (hidden[:, None] & ~own[..., None])[:, None]
        return scores.masked_fill(blocked, float("-inf"))

    name = "attn.hook_attn_scores"
    if layers is None:
        return Interventions([(lambda hook: hook.startswith("blocks.") and hook.endswith(name), edit)])
    return Interventions((f"blocks.{layer}.{name}", edit) for layer in layers)


def mask_image(inputs: Any, box: Place = "image", layers: Sequence[int] | None = None) -> Interventions:
    """Hides the image tokens of a box (or of another place in the image) from all other tokens, in all layers or some.

    The vision tower has mixed information among image tokens before, so neighbours of the box carry some of its content. To remove
    that too, paint over the pixels.

    Args:
        box: (x0, y0, x1, y1) in original pixels of the first image, or another place.
    Raises:
        ValueError: the place has tokens that are not image tokens, or as `hide`.
    """
    for row in range(len(inputs)):
        places = inputs.resolve(box, row)
        if not bool((inputs.token_types[row, places] > 0).all()):
            raise ValueError(f"the place {box!r} of row {row} has tokens that are no image's: hide(inputs, place) hides any tokens.")
    return hide(inputs, box, layers)


def drop_tokens(inputs: Any, span: Place, from_layer: int) -> Interventions:
    """Removes tokens from the residual stream before a block (FastV); this and all later blocks run without them, faster.

    The other tokens keep their positions, so the result equals hiding the dropped tokens' keys from that block on
    (`hide(inputs, span, range(from_layer, L))`). Logits at dropped positions are computed from the stream that entered the
    block, and a cache has NaN there from that block on. In a batch, a position is removed only if every row drops it; in
    other rows its keys are hidden.

    Args:
        from_layer: the first block that runs without the tokens, 1..L−1.
    Raises:
        ValueError: no such block or place, or the span contains the last position; when run: another model than a HookedQwen2VL.
    """
    if from_layer < 1:
        raise ValueError(
            f"from_layer must be at least 1, got {from_layer}: tokens leave after a block; to run without them at all, hide them."
        )
    where = Where.of(inputs, span)
    dropped: Any = where.rows
    if bool(dropped[:, -1].any()):
        raise ValueError("the span holds the last position, whose prediction is read: drop other tokens.")

    def edit(stream: Float[Tensor, "batch pos d_model"], hook: Any) -> Tensor:
        running = running_positions.get()
        if running is None or from_layer >= running.n_layers:
            n = "only a HookedQwen2VL can" if running is None else f"from_layer must be in 1..{running.n_layers - 1}, got {from_layer}: to"
            raise ValueError(f"{n} run without tokens.")
        require_prompt(where.shape, hook, "these interventions were")
        if len(stream) % len(dropped):
            raise ValueError(f"{len(stream)} rows are run, the tokens to drop were named for {len(dropped)}.")
        return running.narrow(stream, dropped.repeat(len(stream) // len(dropped), 1))

    return Interventions([(f"blocks.{from_layer - 1}.hook_resid_post", edit)])
