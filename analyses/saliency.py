"""Saliency: which image tokens each token of an answer depends on, by interventions and by the usual baselines.

The answer is teacher-forced or generated; every token of it gets a map over the image tokens.

    knockout               exact: log p(token), minus log p(token) when no later position may attend to the image token, in all
                           layers or some. One cached run; then batches of runs that start at their first hidden image token.
    occlusion              log p, minus log p when the image token's pixels are the image's mean colour; the tower runs again.
    integrated gradients   of log p, from the mean colour to the image, summed over an image token's pixels (captum).
    attention              from the position that predicts the token to the image token, mean over layers and heads.
    rollout                attention rollout; each layer is half attention, half identity.
    attention × gradient   relevance propagated through the positive part of attention × its gradient, mean over heads.
    random                 uniform random numbers.

The first three are differences of log-probabilities in nats (positive: the token is less likely without the image token); the
others have no unit. `curves` evaluates a map: it hides the image tokens, or shows them, in the order of the map.

Sources: Geva et al. 2023 (knockout); Zeiler & Fergus 2014; Sundararajan et al. 2017; Abnar & Zuidema 2020; Chefer et al. 2021;
Petsiuk et al. 2018 (insertion and deletion).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from analyses.common.attention import attention_patterns
from analyses.common.prompts import Prompt
from analyses.common.result import Result
from analyses.patched_runs import entering, key_value_names, keys_and_values_before
from hooked_qwen2vl.image_embeddings import merge
from hooked_qwen2vl.protocols import Model

METHODS = ("knockout", "occlusion", "integrated gradients", "attention × gradient", "rollout", "attention", "random")


@dataclass(frozen=True)
class Saliency(Result):
    """A map over the image tokens for each token of an answer.

    Attributes:
        values: [answer image_token] in raster order, image after image; the module's docstring defines each method's values.
        log_probs: [answer] log-probabilities of the answer's tokens with the whole image, nats.
        token_ids: [answer]. tokens: their texts.
        grids: (rows, cols) of each image. sizes: (width, height) of each image in original pixels.
        method: one of METHODS. layers: layers in which keys were hidden (knockout); None: all.
        question: text of the prompt's question. model_name: name of the model.
    """

    values: Float[Tensor, "answer image_token"]
    log_probs: Float[Tensor, "answer"]
    token_ids: Int[Tensor, "answer"]
    tokens: tuple[str, ...]
    grids: tuple[tuple[int, int], ...]
    sizes: tuple[tuple[int, int], ...]
    method: str
    layers: tuple[int, ...] | None
    question: str
    model_name: str

    @property
    def whole(self) -> Float[Tensor, "image_token"]:
        """The map of the whole answer: the sum over its tokens."""
        return self.values.sum(0)

    def maps(self, values: Float[Tensor, "image_token"] | None = None) -> list[Float[Tensor, "rows cols"]]:
        """Values over the image tokens as one map per image; None: the values of the whole answer."""
        parts = (self.whole if values is None else values).split([rows * cols for rows, cols in self.grids])
        return [part.reshape(grid) for part, grid in zip(parts, self.grids)]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per answer token and image token: image, row and column, box in original pixels, value."""
        rows = []
        for number, token in enumerate(self.tokens):
            for image, (values, size) in enumerate(zip(self.maps(self.values[number]), self.sizes)):
                (n_rows, n_cols), (width, height) = values.shape, size
                for (row, col), value in np.ndenumerate(values.numpy()):
                    box = (col * width / n_cols, row * height / n_rows, (col + 1) * width / n_cols, (row + 1) * height / n_rows)
                    place = {"answer_token": number, "token": token, "image": image, "row": row, "col": col}
                    rows.append({**place, **dict(zip(("x0", "y0", "x1", "y1"), box)), "value": float(value)})
        return pd.DataFrame(rows)

    def plot(self, path: Any = None, images: Sequence[Any] | None = None) -> Any:
        """The maps of the whole answer and of each of its tokens, over the images (PIL, as the model was given them) if given."""
        from analyses.views.saliency import saliency_plot

        return saliency_plot(self, path, images)

    def page(self, images: Sequence[Any], path: Any) -> None:
        """Writes an HTML page that shows the map of the answer token that the reader chooses."""
        from analyses.views.saliency import saliency_page

        saliency_page(self, images, path)


@dataclass(frozen=True)
class Curves(Result):
    """Probability of an answer when more and more image tokens are hidden (deletion) or shown (insertion), in the order of a map.

    Attributes:
        shares: [step] share of the image tokens that are hidden (deletion) or shown (insertion), 0 to 1.
        deletion, insertion: [step] probability of the whole answer; the most important tokens come first.
        by: "keys" or "pixels". method: of the map. model_name: name of the model.
    """

    shares: Float[Tensor, "step"]
    deletion: Float[Tensor, "step"]
    insertion: Float[Tensor, "step"]
    by: str
    method: str
    model_name: str

    @property
    def areas(self) -> tuple[float, float]:
        """(area under the deletion curve, area under the insertion curve); a good map has a small first and a large second."""
        deletion, insertion = (float(torch.trapezoid(curve, self.shares)) for curve in (self.deletion, self.insertion))
        return deletion, insertion

    def to_dataframe(self) -> pd.DataFrame:
        """One row per step."""
        columns = {"share": self.shares, "deletion": self.deletion, "insertion": self.insertion}
        return pd.DataFrame({name: values.tolist() for name, values in columns.items()})

    def plot(self, path: Any = None) -> Any:
        """Both curves."""
        from analyses.views.saliency import curves_plot

        return curves_plot([self], path)


def token_effects(
    model: Model,
    inputs: Prompt,
    row: int = 0,
    target: str | int | None = None,
    layers: Sequence[int] | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Saliency:
    """The exact effect of every image token on every token of the answer: `saliency` by knockout."""
    return saliency(model, inputs, "knockout", row, target, layers, batch_size, progress=progress)


def saliency(
    model: Model,
    inputs: Prompt,
    method: str = "knockout",
    row: int = 0,
    target: str | int | None = None,
    layers: Sequence[int] | None = None,
    batch_size: int = 16,
    steps: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Saliency:
    """Maps over the image tokens of one prompt, one for each token of its answer.

    Args:
        inputs: prompts with an answer (`to_inputs(…, answers=…)`, or `generate(…, return_type="inputs")`), or without an
            answer; then give `target`, the next token to explain.
        method: one of METHODS. row: which prompt.
        layers: consecutive layers for the knockout; None: all.
        batch_size: number of changed copies of the prompt per forward; limits the memory.
        steps: of the integral, for integrated gradients. seed: of "random".
    Raises:
        ValueError: an unknown method, no image, a video, an answer and a target or neither, or layers with another method.
        ImportError: integrated gradients without captum.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    if layers is not None and method != "knockout":
        raise ValueError(f"layers= are those in which keys are hidden: they go with method='knockout', not {method!r}.")
    scene = Scene(model, inputs, row, target)
    with torch.no_grad():
        base = scene.unchanged()
        if method == "knockout":
            runs = KeyRuns(scene, layers)
            values = base - _cells(runs.log_probs, torch.eye(scene.n, dtype=torch.bool), batch_size, progress)
        elif method == "occlusion":
            runs = PixelRuns(scene)
            values = base - _cells(runs.log_probs, torch.eye(scene.n, dtype=torch.bool), batch_size, progress)
        elif method == "integrated gradients":
            values = _integrated_gradients(PixelRuns(scene), steps, batch_size).T
        elif method == "attention × gradient":
            values = _attention_gradient(scene).T
        elif method == "random":
            drawn = torch.rand(len(scene.reads), scene.n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            values = drawn.T
        else:
            values = _attention(scene, method == "rollout").T
    item = scene.item
    visuals = item.visuals
    said = tuple(model.to_string(token.view(1)) for token in scene.ids)
    kept = None if layers is None else tuple(layers)
    question = model.to_string(item.tokens[0, item.positions("question")]) if item.has_segment("question") else ""
    return Saliency(
        values.T.cpu().double(), base.cpu().double(), scene.ids.cpu(), said,
        tuple(visual.token_grid[1:] for visual in visuals), tuple(tuple(visual.size) for visual in visuals),
        method, kept, question, str(model.cfg.model_name),
    )  # fmt: skip


@torch.no_grad()
def curves(
    model: Model,
    inputs: Prompt,
    order: Saliency | Float[Tensor, "image_token"],
    by: str = "keys",
    row: int = 0,
    target: str | int | None = None,
    steps: int = 10,
    batch_size: int = 16,
) -> Curves:
    """Insertion and deletion of image tokens in the order of a map.

    Args:
        order: a `Saliency` (the map of its whole answer), or a value for each image token; the largest come first.
        by: "keys": no later position attends to hidden tokens; "pixels": their pixels are the image's mean colour. Curves by keys
            use the same intervention as the knockout, so compare a knockout map by both.
        inputs, row, target, batch_size: see `saliency`. steps: number of steps from share 0 to share 1.
    Raises:
        ValueError: a map with another number of image tokens, an unknown `by`, or as `saliency`.
    """
    if by not in ("keys", "pixels"):
        raise ValueError(f"by must be 'keys' or 'pixels', got {by!r}.")
    scene = Scene(model, inputs, row, target)
    values = order.whole if isinstance(order, Saliency) else order
    if values.shape != (scene.n,):
        raise ValueError(f"expected a value for each of {scene.n} image tokens, got {tuple(values.shape)}.")
    rank = torch.empty(scene.n, dtype=torch.long)
    rank[values.argsort(descending=True, stable=True)] = torch.arange(scene.n)
    counts = torch.linspace(0, scene.n, min(steps, scene.n) + 1).round().long()
    gone = rank[None] < counts[:, None]
    runs = KeyRuns(scene, None) if by == "keys" else PixelRuns(scene)
    probability = _cells(runs.log_probs, torch.cat((gone, ~gone)), batch_size, False).sum(-1).exp().cpu().double()
    method = order.method if isinstance(order, Saliency) else "given"
    n = len(counts)
    return Curves(counts.double() / scene.n, probability[:n], probability[n:], by, method, str(model.cfg.model_name))


# ---- runs ---------------------------------------------------------------------------------------


class Scene:
    """One prompt, its image tokens, and the tokens to explain.

    Attributes:
        item: the prompt, encoded. image: positions of its image tokens; n: their number.
        ids: the tokens to explain. reads: the positions that predict them. end: the last of these + 1.
    """

    def __init__(self, model: Model, inputs: Prompt, row: int, target: str | int | None):
        self.model, item = model, model.as_inputs(inputs)
        self.item = item = model.encode(item[row])
        if not item.visuals or len(item.video_grids):
            raise ValueError("saliency is over the tokens of images: the prompt has " + ("a video." if item.visuals else "none."))
        self.image = item.positions("image").cpu()
        self.n = len(self.image)
        if item.has_segment("answer") == (target is not None):
            found = "both" if target is not None else "neither"
            raise ValueError(
                f"expected a prompt with an answer (to_inputs(…, answers=…) or generate(…, return_type='inputs')) or a target=, got {found}."
            )
        if target is None:
            places = item.positions("answer").cpu()
            self.reads, self.ids = places - 1, item.tokens[0, places.to(item.device)]
        else:
            token = model.to_single_token(target) if isinstance(target, str) else int(target)
            if not 0 <= token < model.cfg.d_vocab:
                raise ValueError(f"target must be a token in 0..{model.cfg.d_vocab - 1}, got {token}.")
            self.reads, self.ids = item.positions("last").cpu(), torch.tensor([token], device=item.device)
        if int(self.reads.min()) <= int(self.image.max()):
            raise ValueError("an answer token is predicted before the last image token: explain answers that come after the images.")
        self.end = int(self.reads.max()) + 1

    def unchanged(self) -> Float[Tensor, "answer"]:
        """Log-probabilities with the whole image."""
        first = int(self.reads.min())
        logits = self.model(self.item, logits_at=slice(first, self.end))
        return self.of_logits(logits[:, self.reads - first])[0]

    def read(self, residual: Float[Tensor, "cell pos d_model"], start: int) -> Float[Tensor, "cell answer"]:
        """Log-probabilities from the residual stream after the last block, at the positions from `start` on."""
        return self.of_logits(self.model.read_out(residual[:, self.reads - start]))

    def of_logits(self, logits: Float[Tensor, "cell answer d_vocab"]) -> Float[Tensor, "cell answer"]:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return wide.log_softmax(-1).gather(-1, self.ids.to(wide.device)[None, :, None].expand(len(wide), -1, 1))[..., 0]


def _cells(run: Callable, gone: Bool[Tensor, "cell image_token"], batch_size: int, progress: bool) -> Float[Tensor, "cell answer"]:
    """Applies `run` to the cells (the image tokens to hide in each run) in batches."""
    bar = tqdm(gone.split(batch_size), desc="saliency", unit="batch", disable=not progress, delay=2)
    return torch.cat([run(part) for part in bar])


class KeyRuns:
    """Runs in which no later position attends to some image tokens; they start from one cached run.

    Args:
        layers: consecutive layers in which the keys are hidden; None: all.
    Raises:
        ValueError: layers that are not consecutive, or out of range.
    """

    def __init__(self, scene: Scene, layers: Sequence[int] | None):
        self.scene, model = scene, scene.model
        n = model.cfg.n_layers
        self.layers = range(n) if layers is None else range(min(layers), max(layers) + 1) if len(layers) else range(0)
        if not len(self.layers) or sorted(layers or self.layers) != list(self.layers) or not 0 <= self.layers[0] <= self.layers[-1] < n:
            raise ValueError(f"expected consecutive layers in 0..{n - 1}, got {layers}.")
        names = key_value_names(range(self.layers[0], n))
        with entering(model, [self.layers[0]]) as entered:
            _, self.cache = model.run_with_cache(scene.item, names_filter=names, stop_at_layer=n)
        self.entered = entered[self.layers[0]]

    def log_probs(self, gone: Bool[Tensor, "cell image_token"]) -> Float[Tensor, "cell answer"]:
        """Log-probabilities when the keys of these image tokens are hidden from every later position."""
        scene, model = self.scene, self.scene.model
        hidden = torch.zeros(len(gone), scene.end, dtype=torch.bool)
        hidden[:, scene.image] = gone
        first = int(scene.image[gone.any(0)].min()) if bool(gone.any()) else int(scene.reads.min())
        residual = self.entered[:, first : scene.end].repeat(len(gone), 1, 1)
        past = keys_and_values_before(model, scene.item, self.cache, self.layers[0], first, len(gone))
        residual = model.run_blocks(residual, scene.item, self.layers, past, first, hidden=hidden)
        rest = range(self.layers[-1] + 1, model.cfg.n_layers)
        return scene.read(model.run_blocks(residual, scene.item, rest, past, first), first)


class PixelRuns:
    """Runs with changed pixels: the vision tower, then the decoder from the first image token on."""

    def __init__(self, scene: Scene):
        self.scene, model = scene, scene.model
        self.first = int(scene.image.min())
        self.pixels = scene.item.pixels.to(model.cfg.device, model.cfg.dtype)
        names = key_value_names(range(model.cfg.n_layers))
        with torch.no_grad(), entering(model, ()):
            _, self.cache = model.run_with_cache(scene.item, names_filter=names, stop_at_layer=model.cfg.n_layers)

    @property
    def blank(self) -> Float[Tensor, "patch d_patch"]:
        """Pixels in which every image has its mean colour everywhere."""
        sizes = self.scene.item.grids.prod(-1).tolist()
        parts = [part.unflatten(-1, (3, -1)) for part in self.pixels.split(sizes)]
        return torch.cat([part.mean((0, 2))[None, :, None].expand_as(part).flatten(1) for part in parts])

    def per_token(self, of_patches: Float[Tensor, "patch"]) -> Float[Tensor, "image_token"]:
        """Sums over the patches of each image token; patches are ordered by merge block."""
        return of_patches.view(self.scene.n, -1).sum(-1)

    def log_probs(self, gone: Bool[Tensor, "cell image_token"]) -> Float[Tensor, "cell answer"]:
        """Log-probabilities when the pixels of these image tokens are the image's mean colour."""
        patches = gone.repeat_interleave(len(self.pixels) // self.scene.n, dim=1).to(self.pixels.device)
        return self.of_pixels(torch.where(patches[..., None], self.blank, self.pixels))

    def of_pixels(self, pixels: Float[Tensor, "cell patch d_patch"]) -> Float[Tensor, "cell answer"]:
        """Log-probabilities for changed pixels."""
        scene, model, n = self.scene, self.scene.model, len(pixels)
        grids = scene.item.grids.repeat(n, 1)
        images = model.vision_projector(model.vision_encoder(pixels.flatten(0, 1), grids), grids)
        embedded = model.hook_embed(merge(model.embed(scene.item.tokens).repeat(n, 1, 1), images[0], scene.item))
        past = keys_and_values_before(model, scene.item, self.cache, 0, self.first, n)
        residual = embedded[:, self.first : scene.end]
        return scene.read(model.run_blocks(residual, scene.item, None, past, self.first, images), self.first)


# ---- gradients and attention --------------------------------------------------------------------


def _integrated_gradients(runs: PixelRuns, steps: int, batch_size: int) -> Float[Tensor, "answer image_token"]:
    try:
        from captum.attr import IntegratedGradients
    except ImportError as error:
        raise ImportError("integrated gradients are captum's: pip install hooked-qwen2vl[saliency].") from error
    method, values = IntegratedGradients(runs.of_pixels, multiply_by_inputs=True), []
    with torch.enable_grad():
        for number in range(len(runs.scene.reads)):
            given = method.attribute(
                runs.pixels[None], runs.blank[None], target=number, n_steps=steps, method="gausslegendre", internal_batch_size=batch_size
            )
            values.append(runs.per_token(given.detach()[0].cpu().double().sum(-1)))
    return torch.stack(values)


def _attention(scene: Scene, rollout: bool) -> Float[Tensor, "answer image_token"]:
    if not rollout:
        reads, image = scene.reads, scene.image
        with attention_patterns(scene.model, lambda pattern: pattern[0, :, reads][:, :, image].cpu().double().mean(0)) as given:
            scene.model(scene.item, return_type=None)
        return torch.stack(list(given.values())).mean(0)
    with attention_patterns(scene.model, lambda pattern: pattern[0].cpu().double().mean(0)) as given:
        scene.model(scene.item, return_type=None)
    rows = torch.eye(scene.item.shape[1], dtype=torch.float64)[scene.reads]
    for layer in sorted(given, reverse=True):
        rows = 0.5 * rows + 0.5 * rows @ given[layer]
    return rows[:, scene.image]


def _attention_gradient(scene: Scene) -> Float[Tensor, "answer image_token"]:
    patterns: dict[int, Tensor] = {}

    def keep(pattern: Tensor, hook: Any) -> Tensor:
        pattern = pattern if pattern.requires_grad else pattern.detach().requires_grad_()
        patterns[hook.layer()] = pattern
        return pattern

    first, values = int(scene.reads.min()), []
    hooks = [(f"blocks.{layer}.attn.hook_pattern", keep) for layer in range(scene.model.cfg.n_layers)]
    with torch.enable_grad():
        logits = scene.model.run_with_hooks(scene.item, fwd_hooks=hooks, logits_at=slice(first, scene.end))
        log_probs = scene.of_logits(logits[:, scene.reads - first])[0]
        for number, read in enumerate(scene.reads.tolist()):
            grads = torch.autograd.grad(log_probs[number], list(patterns.values()), retain_graph=number + 1 < len(scene.reads))
            row = torch.eye(scene.item.shape[1], dtype=torch.float64)[read]
            relevance = {l: (p * g).detach()[0].clamp(min=0).cpu().double().mean(0) for (l, p), g in zip(patterns.items(), grads)}
            for layer in sorted(relevance, reverse=True):
                row = row + row @ relevance[layer]
            values.append(row[scene.image])
    return torch.stack(values)
