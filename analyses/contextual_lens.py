"""The contextual lens: an answer is grounded where its contextual embedding is close to an image token's.

1. Run the prompt with its answer. h^l is the residual stream at layer l of 0..L (before block l; L: after the last).
2. Average it over the answer's tokens at a late layer, without any norm: a = mean_t h^{l_T}(a_t). The positions are those
   of the answer's own tokens, without end tokens (our choice).
3. Score = max_n cos(a, h^{l_I}(v_n)) over the image tokens v_n at a middle layer. A low score suggests a hallucination.
   Defaults l_I = round(0.5 L), l_T = round(0.75 L); `sweep_layers` picks them by AUROC on a validation split.
4. Grounding. Heat map: max_{l ≥ 1} cos(h^l(a), h^l(v_n)). Box: the rectangle of image tokens whose mean vector, at the
   layer l_I, has the largest cosine with a; all rectangles are compared, by integral image in float64. Using the score's
   two layers for the box is our choice: the box's cosine is then never below the score.

Source: Beyond Logit Lens (arXiv 2411.19187). Its tables were not available: no reproduction of its numbers is claimed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from sklearn.metrics import roc_auc_score
from torch import Tensor
from tqdm.auto import tqdm

from analyses.common.rectangles import Cells, best_rectangle
from analyses.common.result import Result
from analyses.common.vocabulary import characters
from analyses.logit_lens import residual_stack
from hooked_qwen2vl.moved import renamed_arguments
from hooked_qwen2vl.protocols import Model

# Word characters of the scripts that put spaces between words, and combining accents; without Thai to Myanmar, Khmer, the
# scripts of Chinese, Japanese and Korean, and their extensions.
_SPACED = r"(?:[^\W\u0e00-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\ud7ff\uf900-\ufaff\uff66-\uffdc\U00016fe0-\U0003ffff]|[\u0300-\u036f])"

Span = str | slice | Sequence[int] | Tensor


@dataclass(frozen=True)
class ContextualScore(Result):
    """The largest cosine of each span's contextual embedding with an image token's.

    Attributes:
        scores: [span] cosine with the closest image token, in [-1, 1]; a low score suggests a hallucination.
        similarity: [span image_token] cosine with each image token, in [-1, 1]; all images of the row, in order.
        names: of the spans. texts: the text of each span.
        images: [image_token] which image each token belongs to.
        boxes: [image_token 4] (x0, y0, x1, y1) in that image's original pixels.
        image_layer, text_layer: l_I and l_T, the layers compared.
        model_name: of the model.
    """

    scores: Float[Tensor, "span"]
    similarity: Float[Tensor, "span image_token"]
    names: tuple[str, ...]
    texts: tuple[str, ...]
    images: Int[Tensor, "image_token"]
    boxes: Float[Tensor, "image_token 4"]
    image_layer: int
    text_layer: int
    model_name: str

    @property
    def score(self) -> float:
        """The score of the only span.

        Raises:
            ValueError: there are several; use `scores`.
        """
        if len(self.names) != 1:
            raise ValueError(f"there are {len(self.names)} spans ({', '.join(self.names)}): use .scores or .to_dataframe().")
        return float(self.scores[0])

    def to_dataframe(self) -> pd.DataFrame:
        """One row per span: its score, and the image and box (in original pixels) of the closest image token."""
        best = self.similarity.argmax(-1)
        table = pd.DataFrame({"span": self.names, "text": self.texts, "score": self.scores.tolist()})
        table["image"] = self.images[best].tolist()
        table[["x0", "y0", "x1", "y1"]] = self.boxes[best].numpy()
        return table

    def plot(self, path: Any = None) -> Any:
        """The score of each span as a bar."""
        from analyses.views.grounding import score_plot

        return score_plot(self, path)


@dataclass(frozen=True)
class LayerSweep(Result):
    """For every pair of layers, the AUROC with which the score tells correct answers from wrong ones.

    Attributes:
        auroc: [image_layer text_layer], in [0, 1].
        image_layer, text_layer: the best pair (the first of equals). Report its AUROC on other items than these.
        n_items, n_correct: how many items it was measured on, and how many of them are correct.
        model_name: of the model.
    """

    auroc: Float[Tensor, "image_layer text_layer"]
    image_layer: int
    text_layer: int
    n_items: int
    n_correct: int
    model_name: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair of layers."""
        return pd.DataFrame(
            {"image_layer": i, "text_layer": t, "auroc": float(value)} for i, row in enumerate(self.auroc) for t, value in enumerate(row)
        )

    def plot(self, path: Any = None) -> Any:
        """The AUROC of every pair, the chosen one framed."""
        from analyses.views.grounding import sweep_plot

        return sweep_plot(self, path)


@dataclass(frozen=True)
class Grounding(Result):
    """Where an answer is in the images: heat maps and boxes.

    Attributes:
        heat: for each image [rows cols], the largest cosine with the answer over layers ≥ 1, in [-1, 1]: the paper's heat map.
        similarity: for each image [rows cols], the cosine at the box's two layers; its maximum is the contextual score. The box
            is computed from these layers, so it need not contain the maximum of `heat`.
        cells: for each image its best rectangle (row0, col0, row1, col1) in image tokens, row1 and col1 excluded.
        boxes: [image 4] the same rectangles (x0, y0, x1, y1) in original pixels of their image.
        box_scores: [image] cosine of each rectangle's mean vector with the answer.
        sizes: (width, height) of each image in original pixels.
        text: the answer. image_layer, text_layer: the layers compared for the box.
        model_name: of the model.
    """

    heat: tuple[Float[Tensor, "_rows _cols"], ...]
    similarity: tuple[Float[Tensor, "_rows _cols"], ...]
    cells: tuple[Cells, ...]
    boxes: Float[Tensor, "image 4"]
    box_scores: Float[Tensor, "image"]
    sizes: tuple[tuple[float, float], ...]
    text: str
    image_layer: int
    text_layer: int
    model_name: str

    @property
    def image(self) -> int:
        """The image with the best box."""
        return int(self.box_scores.argmax())

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The best box of all images, (x0, y0, x1, y1) in original pixels of image `self.image`."""
        return tuple(self.boxes[self.image].tolist())

    def to_dataframe(self) -> pd.DataFrame:
        """One row per image token: row and column, box in original pixels, cosines, whether its image's best box covers it."""
        rows = []
        for image, (heat, similarity, (r0, c0, r1, c1)) in enumerate(zip(self.heat, self.similarity, self.cells)):
            (height, width), (w, h) = heat.shape, self.sizes[image]
            for row in range(height):
                for col in range(width):
                    corners = (col * w / width, row * h / height, (col + 1) * w / width, (row + 1) * h / height)
                    rows.append(
                        {
                            "image": image,
                            "row": row,
                            "col": col,
                            **dict(zip(("x0", "y0", "x1", "y1"), corners)),
                            "heat": float(heat[row, col]),
                            "cosine": float(similarity[row, col]),
                            "in_box": r0 <= row < r1 and c0 <= col < c1,
                        }
                    )
        return pd.DataFrame(rows)

    def plot(self, path: Any = None, images: Sequence[Any] | None = None, truth: Sequence[Any] = (), note: str = "") -> Any:
        """For each image: the picture if given, the cosine at the two layers with the box, and the maximum over layers.

        Args:
            images: PIL images, one for each of the row's.
            truth: known boxes in original pixels of the first image, drawn dashed. note: a line of text below the title.
        """
        from analyses.views.grounding import grounding_plot

        return grounding_plot(self, path, images, truth, note)


@torch.no_grad()
def contextual_score(
    model: Model,
    inputs: Any,
    row: int = 0,
    image_layer: int | None = None,
    text_layer: int | None = None,
    span: Span | Mapping[str, Span] = "answer",
    stack: Float[Tensor, "layer pos d_model"] | None = None,
) -> ContextualScore:
    """The contextual score of an answer, or of several spans of one prompt; a high score: more likely correct.

    Args:
        inputs: prompts with images and a teacher-forced answer: `model.to_inputs(question, images=[im], answers="red")`.
        image_layer, text_layer: layers, 0..L; None takes round(0.5 L) and round(0.75 L).
        span: "answer" or another segment, positions, or a slice; or name -> span for several (see `word_spans`).
        stack: the row's residual stream, if it was computed before: then the model is not run.
    Raises:
        ValueError: no such row, segment, position or layer, or the row has no image.
    """
    layers = default_layers(model, image_layer, text_layer)
    spans = dict(span) if isinstance(span, Mapping) else {span if isinstance(span, str) else "span": span}
    if not spans:
        raise ValueError("expected at least one span, got none.")
    places = {name: span_positions(model, inputs, part, row) for name, part in spans.items()}
    images = inputs.positions("image", row)
    stack = row_stack(model, inputs, row, stack)
    targets = torch.stack([stack[layers[1], p].double().mean(0) for p in places.values()])
    similarity = cosines(targets, stack[layers[0], images])
    grids = [inputs.boxes(row, image) for image in range(n_images(inputs, row))]
    return ContextualScore(
        scores=similarity.max(-1).values,
        similarity=similarity,
        names=tuple(spans),
        texts=tuple(_text(model, inputs, row, p) for p in places.values()),
        images=torch.cat([torch.full((len(boxes),), image) for image, boxes in enumerate(grids)]),
        boxes=torch.cat(grids),
        image_layer=layers[0],
        text_layer=layers[1],
        model_name=str(model.cfg.model_name),
    )


def yes_no_score(
    model: Model,
    inputs: Any,
    noun: str,
    row: int = 0,
    image_layer: int | None = None,
    text_layer: int | None = None,
    stack: Float[Tensor, "layer pos d_model"] | None = None,
) -> float:
    """The score of a yes/no answer: the score of the question's noun, negated if the answer is no.

    Args:
        noun: a word of the question, such as "dog" in "Is there a dog in the image?"; if it occurs twice, the last one counts.
    Raises:
        ValueError: the question has no such word, or the answer is neither yes nor no.
    """
    positions, sign = yes_no_subject(model, inputs, noun, row)
    return sign * contextual_score(model, inputs, row, image_layer, text_layer, positions, stack).score


def yes_no_subject(model: Model, inputs: Any, noun: str, row: int = 0) -> tuple[list[int], int]:
    """(positions of the noun in the question, +1 if the answer is yes, -1 if it is no)."""
    answer = _text(model, inputs, row, span_positions(model, inputs, "answer", row)).strip().lower()
    said = re.match(r"(yes|no)\b", answer)
    if said is None:
        raise ValueError(f"expected an answer that begins with yes or no, got {answer!r}.")
    return list(word_spans(model, inputs, [noun], row, "question").values())[-1], 1 if said[1] == "yes" else -1


@torch.no_grad()
def sweep_layers(model: Model, items: Iterable[Any], labels: Sequence[bool], span: Span = "answer", progress: bool = True) -> LayerSweep:
    """Picks the two layers by AUROC on a validation split.

    Args:
        items: `Inputs` of one row each, with image and teacher-forced answer; may be a generator.
        labels: whether each answer is correct.
    Raises:
        ValueError: the labels are not one for each item, or all the same.
    """
    labels = [bool(label) for label in labels]
    if len(set(labels)) < 2:
        raise ValueError(f"AUROC needs right and wrong answers, got {sum(labels)} right of {len(labels)}.")
    grids = []
    for item in tqdm(items, total=len(labels), desc="sweep", unit="item", disable=not progress, delay=2):
        stack = row_stack(model, item, 0)
        targets = stack[:, span_positions(model, item, span, 0)].double().mean(1)
        vectors = stack[:, item.positions("image")]
        grids.append(torch.stack([cosines(targets, layer).max(-1).values for layer in vectors]))
    if len(grids) != len(labels):
        raise ValueError(f"expected one label for each item, got {len(labels)} for {len(grids)}.")
    scores = torch.stack(grids)  # [item image_layer text_layer]
    n = scores.shape[1]
    auroc = torch.tensor([[roc_auc_score(labels, scores[:, i, t].numpy()) for t in range(n)] for i in range(n)])
    image_layer, text_layer = divmod(int(auroc.argmax()), n)
    return LayerSweep(auroc, image_layer, text_layer, len(labels), sum(labels), str(model.cfg.model_name))


@torch.no_grad()
def ground(
    model: Model,
    inputs: Any,
    row: int = 0,
    image_layer: int | None = None,
    text_layer: int | None = None,
    span: Span = "answer",
    stack: Float[Tensor, "layer pos d_model"] | None = None,
) -> Grounding:
    """The answer's heat map over each image of the row, and the box in each image that fits the answer best.

    Args:
        inputs, row, span, stack: as `contextual_score`.
        image_layer, text_layer: layers compared for the box; the heat map takes the maximum over all layers ≥ 1.
    Raises:
        ValueError: as `contextual_score`.
    """
    layers = default_layers(model, image_layer, text_layer)
    places = span_positions(model, inputs, span, row)
    stack = row_stack(model, inputs, row, stack)
    answers = stack[:, places].double().mean(1)
    heat, similarity, cells, boxes, scores, sizes = [], [], [], [], [], []
    for image in range(n_images(inputs, row)):
        grid = inputs.grid(row, image)
        vectors = stack[:, inputs.positions(f"image[{image}]", row)]
        by_layer = torch.stack([cosines(a[None], v)[0] for a, v in zip(answers[1:], vectors[1:])])
        heat.append(by_layer.max(0).values.reshape(grid))
        similarity.append(cosines(answers[layers[1]][None], vectors[layers[0]])[0].reshape(grid))
        best, score = best_rectangle(vectors[layers[0]].unflatten(0, grid), answers[layers[1]])
        cells.append(best)
        scores.append(score)
        tokens = inputs.boxes(row, image)
        boxes.append(_pixels(best, tokens.unflatten(0, grid)))
        sizes.append(tuple(tokens[-1, 2:].tolist()))
    return Grounding(
        heat=tuple(heat),
        similarity=tuple(similarity),
        cells=tuple(cells),
        boxes=torch.stack(boxes),
        box_scores=torch.tensor(scores, dtype=torch.float64),
        sizes=tuple(sizes),
        text=_text(model, inputs, row, places),
        image_layer=layers[0],
        text_layer=layers[1],
        model_name=str(model.cfg.model_name),
    )


@renamed_arguments
def word_spans(model: Model, inputs: Any, words: Sequence[str], row: int = 0, segment: str = "answer") -> dict[str, list[int]]:
    """Positions of each occurrence of some words in a segment of the prompt: "star", "star (2)", … -> positions.

    For a caption, pass its nouns; finding the nouns is left to the caller (or a tagger).

    Args:
        words: matched as whole words, in any case; in scripts without spaces between words (Chinese, Japanese, Korean, Thai,
            …) any occurrence matches. Every token that overlaps a word belongs to it, also one that is part of a character.
    Raises:
        ValueError: a word does not occur in the segment, or is empty.
    """
    if not all(word.strip() for word in words):
        raise ValueError(f"expected words to find, got an empty one among {list(words)}.")
    places = inputs.positions(segment, row).tolist()
    text, spans = characters(model, inputs.tokens[row, places].tolist())
    found: dict[str, list[int]] = {}
    for word in dict.fromkeys(words):
        matches = list(re.finditer(_whole_word(word), text, re.IGNORECASE))
        if not matches:
            raise ValueError(f"the {segment} {text!r} has no word {word!r}.")
        for number, match in enumerate(matches, 1):
            covered = [p for p, (start, end) in zip(places, spans) if start < match.end() and end > match.start()]
            found[word if number == 1 else f"{word} ({number})"] = covered
    return found


def _whole_word(word: str) -> str:
    """A regular expression for the whole word: no letter on either side, if the word's script puts spaces between words."""
    before, after = (re.match(r"\w", edge) is None or re.match(_SPACED, edge) is not None for edge in (word[0], word[-1]))
    return (f"(?<!{_SPACED})" if before else "") + re.escape(word) + (f"(?!{_SPACED})" if after else "")


# ---- shared with the baselines ----------------------------------------------------------------------


def default_layers(model: Model, image_layer: int | None, text_layer: int | None) -> tuple[int, int]:
    """(l_I, l_T), with the defaults for None.

    Raises:
        ValueError: a layer is not in 0..L.
    """
    n_layers = model.cfg.n_layers
    image_layer = round(0.5 * n_layers) if image_layer is None else image_layer
    text_layer = round(0.75 * n_layers) if text_layer is None else text_layer
    for name, layer in (("image_layer", image_layer), ("text_layer", text_layer)):
        if not 0 <= layer <= n_layers:
            raise ValueError(f"{name} must be a layer in 0..{n_layers}, got {layer}.")
    return image_layer, text_layer


def row_stack(model: Model, inputs: Any, row: int, stack: Float[Tensor, "layer pos d_model"] | None = None) -> Tensor:
    """The residual stream [layer pos d_model] of one row, without the final norm, on the CPU: `stack`, or else from a run.

    Raises:
        ValueError: no such row, or `stack` has another shape than this model and these prompts give.
    """
    expected = (model.cfg.n_layers + 1, inputs.shape[1], model.cfg.d_model)
    if stack is not None and tuple(stack.shape) != expected:
        raise ValueError(f"expected a residual stream [layer pos d_model] of shape {expected}, got {tuple(stack.shape)}.")
    return (residual_stack(model, inputs.row(row))[0][:, 0] if stack is None else stack).cpu()


def span_positions(model: Model, inputs: Any, span: Span, row: int) -> list[int]:
    """Positions of a span; an answer's end tokens are left out.

    Raises:
        ValueError: no such segment, no such position, or an answer with nothing but end tokens.
    """
    found = inputs.resolve(span, row).tolist()
    if isinstance(span, str) and span == "answer":
        ends = set(model.cfg.special.eos)
        found = [p for p in found if int(inputs.tokens[row, p]) not in ends]
        if not found:
            raise ValueError(f"the answer of row {row} is nothing but its end token.")
    return found


def cosines(targets: Float[Tensor, "target d"], vectors: Float[Tensor, "n d"]) -> Float[Tensor, "target n"]:
    """Cosine of every target with every vector, in float64; 0 if one of the two is the zero vector."""
    unit = [x.double() / x.double().norm(dim=-1, keepdim=True).clamp_min(1e-300) for x in (targets, vectors)]
    return (unit[0] @ unit[1].T).clamp(-1.0, 1.0)


def n_images(inputs: Any, row: int) -> int:
    """Number of images in the row."""
    return sum(name.startswith("image[") for name in inputs.segment_names(row))


def _text(model: Model, inputs: Any, row: int, positions: Sequence[int]) -> str:
    ids = inputs.tokens[row, list(positions)].tolist()
    return model.tokenizer.decode(ids) if getattr(model, "tokenizer", None) is not None else " ".join(map(str, ids))


def _pixels(cells: Cells, tokens: Float[Tensor, "rows cols 4"]) -> Float[Tensor, "4"]:
    """The box of a rectangle of image tokens, in original pixels."""
    row0, col0, row1, col1 = cells
    return torch.cat((tokens[row0, col0, :2], tokens[row1 - 1, col1 - 1, 2:]))
