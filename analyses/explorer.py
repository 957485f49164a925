"""The data of the explorer page: what it shows about one prompt with images.

1. Logit lens (nostalgebraist, 2020) at every position and layer: the top k tokens (see `analyses.logit_lens`), and the
   probabilities of the answer's tokens.
2. At the position that predicts the answer, the probabilities of many tokens by layer: those with the largest probability at
   any layer. For all other tokens, their largest probability at each layer is kept as a bound.
3. Contextual heat map (arXiv 2411.19187): cos(mean_t h^l(a_t), h^l(v)) for an image token v, with the mean over the answer's
   tokens a_t (without end tokens) taken before the cosine, and both sides at the same layer l.
4. Attention of every head to every position: from the position that predicts the answer, then from the answer's tokens, the text
   after the images, the other text, and the image tokens, as many as fit into `attention_size`.
5. Patching recovery by layer and position, if a sweep is given, with the other image and its answer.

A video is shown as one image per frame of its grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from transformer_lens.patching import PatchingResult

from analyses.common.attention import attention_patterns
from analyses.common.result import Result
from analyses.common.vocabulary import logits_of
from analyses.logit_lens import LogitLens, logit_lens, residual_stack
from analyses.patching import recovery
from analyses.views.figure import refuse_other_picture
from hooked_qwen2vl.moved import renamed_attributes
from hooked_qwen2vl.protocols import Model


@renamed_attributes
@dataclass(frozen=True)
class Explorer(Result):
    """What the explorer page shows about one prompt. Positions count without padding; layers are 0..L, blocks 0..L−1.

    Attributes:
        lens: logit lens at every position; its targets are the followed tokens.
        segments: [pos] name of the segment that each position belongs to.
        images: in original pixels; for a video one per frame of its grid. starts: position of each image's first token.
            grids: (rows, cols) of each. image_names: their titles.
        last: the position that predicts the answer's first token.
        answer: positions of the answer's tokens, without end tokens; empty without an answer.
        kept_ids: token ids whose probabilities at `last` are kept; kept_tokens: their texts.
        kept_probs: [layer token] their probabilities at `last`, for layers 0..L.
        rest_prob: [layer] largest probability of any other token at `last`; 0 if all tokens are kept.
        queries: the positions whose attention is kept, `last` first.
        attention_from: [layer query head pos] their attention patterns, by block; each sums to 1 over pos.
        contextual: [layer pos] cosine with the answer, for layers 0..L; None without an answer.
        recovery: [layer pos] of a patching sweep, by block; NaN at cells that were not patched; None without a sweep.
        question, answer_text, model_name: as shown on the page.
        other_images, other_answer: image of the corrupted prompt of the sweep, and the model's answer to it; empty without a sweep.
    """

    lens: LogitLens
    segments: tuple[str, ...]
    images: tuple[Image.Image, ...]
    starts: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    image_names: tuple[str, ...]
    last: int
    answer: tuple[int, ...]
    kept_ids: Int[Tensor, "token"]
    kept_tokens: tuple[str, ...]
    kept_probs: Float[Tensor, "layer token"]
    rest_prob: Float[Tensor, "layer"]
    queries: tuple[int, ...]
    attention_from: Float[Tensor, "layer query head pos"]
    contextual: Float[Tensor, "layer pos"] | None
    recovery: Float[Tensor, "layer pos"] | None
    question: str
    answer_text: str
    model_name: str
    other_images: tuple[Image.Image, ...] = ()
    other_answer: str = ""

    @property
    def attention(self) -> Float[Tensor, "layer head pos"]:
        """Attention from the position that predicts the answer, by block."""
        return self.attention_from[:, self.queries.index(self.last)]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer and position: the lens's top token and the values of the maps.

        Probabilities, attention (mean over heads) and recovery are fractions, cosines are in −1..1, entropy is in nats. Values
        that do not exist are NaN: attention and recovery belong to blocks and have none at layer L.
        """
        n_layers, n_positions = self.lens.entropy.shape
        layers = torch.arange(n_layers)[:, None].expand(-1, n_positions)
        columns = {
            "layer": layers,
            "position": torch.tensor(self.lens.positions).expand(n_layers, -1),
            "probability": self.lens.top_probs[..., 0],
            "entropy_nats": self.lens.entropy,
            "attention": _to_entries(self.attention.mean(1), n_layers),
            "contextual": self.contextual if self.contextual is not None else torch.full((n_layers, n_positions), torch.nan),
            "recovery": _to_entries(self.recovery, n_layers, n_positions),
        }
        table = pd.DataFrame({name: values.flatten().numpy() for name, values in columns.items()})
        table.insert(2, "segment", list(self.segments) * n_layers)
        table.insert(3, "prompt_token", list(self.lens.prompt_tokens) * n_layers)
        table.insert(4, "token", [tokens[0] for layer in self.lens.top_tokens for tokens in layer])
        return table

    def page(self, path: Any = None) -> Any:
        """Writes one self-contained HTML page that needs no network; as the last expression of a cell a notebook shows it."""
        from analyses.views.explorer import explorer_page

        return explorer_page(self, path)

    def plot(self, path: Any = None, image: int = 0) -> Any:
        """The page's maps as a figure: one row per map, evenly spaced layers as columns."""
        from analyses.views.attention import maps_on_image

        rows, cols = self.grids[image]
        here = slice(self.starts[image], self.starts[image] + rows * cols)
        maps = {
            "probability of the\nlens's top token": self.lens.top_probs[:, here, 0],
            "cosine with\nthe answer": None if self.contextual is None else self.contextual[:, here],
            "attention from the last\nposition, mean of heads": self.attention.mean(1)[:, here],
            "patching\nrecovery": None if self.recovery is None else self.recovery[:, here],
        }
        kept = {name: values for name, values in maps.items() if values is not None}
        return maps_on_image(kept, self.grids[image], self.images[image], path, title=f"{self.question}, {self.model_name}")

    def plot_heads(self, path: Any = None, image: int = 0, layers: Sequence[int] | None = None) -> Any:
        """Attention from the position that predicts the answer, over the image: one row per block, one column per head."""
        from analyses.views.attention import attention_on_image

        rows, cols = self.grids[image]
        here = slice(self.starts[image], self.starts[image] + rows * cols)
        return attention_on_image(self.attention[..., here], (rows, cols), self.images[image], path, layers=layers)


@torch.no_grad()
def explore(
    model: Model,
    inputs: Any,
    images: Sequence[Image.Image],
    top_k: int = 5,
    follow: Sequence[int | str] = (),
    keep: int = 2048,
    recovered: Float[Tensor, "layer pos"] | None = None,
    row: int = 0,
    question: str = "",
    chunk_size: int = 64,
    videos: Sequence[Sequence[Image.Image]] = (),
    other: Image.Image | None = None,
    other_answer: str = "",
    attention_size: int = 2_000_000,
) -> Explorer:
    """Computes what the explorer page shows, in two forwards.

    Args:
        inputs: prompts with images and, for the contextual map, an answer (`to_inputs(…, answers=…)`, or the result of
            `generate(…, return_type="inputs")`).
        images: the images of this row, in original pixels, in order.
        follow: further tokens whose probabilities are computed at every position, besides the answer's.
        keep: number of tokens whose probabilities are kept at the position that predicts the answer.
        recovered: from `recovery_by_position`, over all positions of the row.
        row: which prompt of the batch.
        videos: the frames of each video of this row.
        other, other_answer: image of the corrupted prompt that `recovered` is about, and the model's answer to it.
        attention_size: largest number of attention weights to keep; those from `last` are always kept.
    Raises:
        ValueError: keep below 1, no image in the prompt, other images than the prompt's, or a recovery of another shape.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}.")
    inputs = inputs.row(row)
    names = inputs.segments[0]
    places = [place for place, name in enumerate(names) if name != "padding"]
    segments = tuple(names[place] for place in places)
    pictures, starts, grids, names_of = _pictures(model, inputs, places, images, videos)
    last = int(inputs.positions("last"))
    ends = set(model.cfg.special.eos)
    own = [p for p in places if names[p] == "answer" and int(inputs.tokens[0, p]) not in ends]
    followed = list(dict.fromkeys([*(int(inputs.tokens[0, p]) for p in own), *_ids(model, follow)]))
    lens = logit_lens(model, inputs, places, top_k, targets=followed or None, chunk_size=chunk_size)
    queries = _queries(segments, places.index(last), model.cfg.n_layers * (model.cfg.n_heads + 1) * len(places), attention_size)
    stack, attention = _run(model, inputs, [places[query] for query in queries])
    kept_ids, kept_probs, rest = _many_tokens(model, stack[:, 0, last], keep)
    if recovered is not None:
        if recovered.shape != (model.cfg.n_layers, inputs.shape[1]):
            expected = (model.cfg.n_layers, inputs.shape[1])
            raise ValueError(f"expected a recovery [layer pos] of shape {expected}, got {tuple(recovered.shape)}.")
        recovered = recovered[:, places].float().cpu()
    return Explorer(
        lens=lens,
        segments=segments,
        images=pictures,
        starts=starts,
        grids=grids,
        image_names=names_of,
        last=places.index(last),
        answer=tuple(places.index(p) for p in own),
        kept_ids=kept_ids,
        kept_tokens=tuple(_texts(model, kept_ids)),
        kept_probs=kept_probs,
        rest_prob=rest,
        queries=queries,
        attention_from=attention[..., places],
        contextual=_contextual(stack[:, 0], own)[:, places] if own else None,
        recovery=recovered,
        question=question,
        answer_text=model.to_string(inputs.tokens[0, own]) if own else "",
        model_name=lens.model_name,
        other_images=() if other is None else (other,),
        other_answer=other_answer,
    )


def recovery_by_position(
    result: PatchingResult, clean_metric: Float[Tensor, "batch"], shape: tuple[int, int], example: int = 0
) -> Float[Tensor, "layer pos"]:
    """Recovery of a sweep over single positions, (patched − baseline) / (clean − baseline); NaN at cells that were not patched.

    Args:
        result: of `patch_sweep`, over single positions of an activation without heads.
        clean_metric: the metric of the clean run.
        shape: (number of layers of the model, number of positions of the prompt).
        example: which pair of the batch.
    Raises:
        ValueError: a sweep by head, rows that are spans, or positions after the end of the prompt.
    """
    if result.axis_names != ["layer", "pos"]:
        raise ValueError(f"expected a sweep over [layer pos], got {list(result.axis_names)}: sweep a stream, not heads.")
    ratios = recovery(result, clean_metric)["per_example"][..., example].flatten()
    filled = torch.full(shape, torch.nan)
    for value, (layer, place) in zip(ratios, result.index_df[["layer", "pos"]].itertuples(index=False)):
        if isinstance(place, str) or not hasattr(place, "__index__"):
            raise ValueError(f"expected rows that are single positions, got {place!r}: leave positions=None, or list them.")
        if not 0 <= place < shape[1]:
            raise ValueError(f"the sweep has a row at position {place}, the prompt has {shape[1]} positions.")
        filled[layer, place] = value
    return filled


def _pictures(
    model: Model, inputs: Any, places: Sequence[int], images: Sequence[Any], videos: Sequence[Sequence[Any]]
) -> tuple[tuple[Any, ...], tuple[int, ...], tuple[tuple[int, int], ...], tuple[str, ...]]:
    """(pictures, positions of their first tokens, grids, titles), for each image and each frame of a video's grid."""
    names = inputs.segment_names()
    n_images, n_videos = (sum(name.startswith(f"{kind}[") for name in names) for kind in ("image", "video"))
    if n_images + n_videos == 0:
        raise ValueError("the prompt has no image to explore: build it with model.to_inputs(question, images=[…]).")
    if len(images) != n_images:
        raise ValueError(f"the prompt has {n_images} images, got {len(images)} to draw: pass the same ones, in order.")
    if len(videos) != n_videos:
        raise ValueError(f"the prompt has {n_videos} videos, got {len(videos)} to draw: pass videos=, the frames of each, in order.")
    found = []
    for k, image in enumerate(images):
        _refuse_another(model, inputs, k, image)
        found.append((image, places.index(int(inputs.positions(f"image[{k}]")[0])), inputs.grid(0, k), f"image {k}"))
    for k, frames in enumerate(videos):
        rows, cols = inputs.grid(0, video=k)
        at = inputs.positions(f"video[{k}]").reshape(-1, rows * cols)[:, 0].tolist()
        pair = model.cfg.vision.temporal_patch_size
        if len(at) != -(-len(frames) // pair):
            raise ValueError(f"video {k} of the prompt has {len(at)} × {pair} frames, got {len(frames)} to draw: pass the same ones.")
        for f, place in enumerate(at):
            refuse_other_picture(frames[pair * f], (rows, cols))
            found.append((frames[pair * f], places.index(place), (rows, cols), f"video {k}, frame {pair * f}"))
    pictures, starts, grids, said = zip(*found)
    return pictures, starts, grids, said


def _queries(segments: Sequence[str], last: int, each: int, size: int) -> tuple[int, ...]:
    """The positions whose attention is kept, in the order of step 4 above.

    Args:
        each: attention weights per position. size: attention weights to keep at most.
    """
    seen = [place for place, name in enumerate(segments) if name.startswith(("image[", "video["))]
    text = [place for place in range(len(segments)) if place not in set(seen)]
    answer = [place for place in text if segments[place] == "answer"]
    after = [place for place in reversed(text) if place > seen[-1]]
    return tuple(dict.fromkeys((last, *answer, *after, *reversed(text), *seen)))[: max(1, size // each)]


def _refuse_another(model: Model, inputs: Any, number: int, image: Any) -> None:
    """Raises ValueError if a picture is not the prompt's: other proportions, or other pixels if the processor gives it the same grid."""
    refuse_other_picture(image, inputs.grid(0, number))
    if model.processor is None:
        return
    given = model.to_inputs("x", images=[image], template=False)
    if given.grid() == inputs.grid(0, number):
        ours, theirs = (x.unpack_image(x.pixels.cpu(), 0, k) for x, k in ((given, 0), (inputs, number)))
        if not torch.allclose(ours, theirs, atol=0.1):
            raise ValueError(f"image {number} to draw is not image {number} of the prompt: pass the prompt's own, in its order.")


def _run(
    model: Model, inputs: Any, queries: Sequence[int]
) -> tuple[Float[Tensor, "layer 1 pos d_model"], Float[Tensor, "block query head pos"]]:
    """One forward: the residual stream, and the attention patterns of `queries` only, because whole patterns would fill the memory."""
    rows = list(queries)
    with attention_patterns(model, lambda pattern: pattern[0][:, rows].transpose(0, 1).float().cpu()) as patterns:
        stack, _ = residual_stack(model, inputs)
    return stack, torch.stack(list(patterns.values()))


def _many_tokens(
    model: Model, streams: Float[Tensor, "layer d_model"], keep: int
) -> tuple[Int[Tensor, "token"], Float[Tensor, "layer token"], Float[Tensor, "layer"]]:
    """(ids of the tokens with the largest probability at any layer, their probabilities, largest probability of all others)."""
    probs = logits_of(model, streams).softmax(-1)
    kept = probs.amax(0).topk(min(keep, probs.shape[1])).indices.sort().values
    others = probs.clone()
    others[:, kept] = 0
    return kept, probs[:, kept], others.amax(-1)


def _contextual(stack: Float[Tensor, "layer pos d_model"], answer: Sequence[int]) -> Float[Tensor, "layer pos"]:
    """Cosine of every position with the mean over the answer's positions, at each layer."""
    wide = stack.float()
    return F.cosine_similarity(wide, wide[:, list(answer)].mean(1, keepdim=True), dim=-1).cpu()


def _to_entries(values: Tensor | None, n_layers: int, n_positions: int = 0) -> Tensor:
    """A map over blocks as a map over layers: block l goes to layer l, and layer L is NaN."""
    if values is None:
        return torch.full((n_layers, n_positions), torch.nan)
    return F.pad(values, (0, 0, 0, n_layers - len(values)), value=torch.nan)


def _ids(model: Model, tokens: Sequence[int | str]) -> list[int]:
    return [token if isinstance(token, int) else model.to_single_token(token) for token in tokens]


def _texts(model: Model, ids: Tensor) -> list[str]:
    """The texts of token ids; without a tokenizer the ids as text."""
    return [str(int(i)) for i in ids] if model.tokenizer is None else model.to_str_tokens(ids)
