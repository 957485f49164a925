"""Previous-token, duplicate-token and induction heads, on text and among image tokens: are they the same heads?

1. Text: a passage, repeated once. Image: a picture, repeated once. For the image, tokens at the same place of the picture
   count as the same token, so that the three kinds are defined among image tokens as they are in text.
2. The pattern of each kind is TransformerLens's (`head_detector`): the previous token; an earlier occurrence of the
   same token; the token after an earlier occurrence of the same token.
3. Score: the share of a head's attention that is on the pattern, over the queries for which the pattern has a key (our choice:
   `detect_head` divides by the attention of all queries, so that even a perfect induction head has at most 0.5).
4. For the positions after the pictures: the share of attention on image tokens, and on the single image token that gets
   most of it (a sink, if far above an even spread).
5. Each score is given together with that of a head that spreads its attention evenly over all visible keys. In a short passage
   that baseline is not small, and a score below it is no evidence for the kind.

All image placeholders have one token id, so `detect_head` itself counts any attention between image tokens as attention to
duplicate tokens. Here every place of the picture has its own id.

Source: TransformerLens's head_detector (Olsson et al. 2022); visual sinks: Kang et al. 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.head_detector import (
    compute_head_attention_similarity_score,
    get_duplicate_token_head_detection_pattern,
    get_induction_head_detection_pattern,
    get_previous_token_head_detection_pattern,
)

from analyses.common.attention import attention_patterns
from analyses.common.result import Result
from hooked_qwen2vl.protocols import Model

KINDS = {
    "previous token": get_previous_token_head_detection_pattern,
    "duplicate token": get_duplicate_token_head_detection_pattern,
    "induction": get_induction_head_detection_pattern,
}
PASSAGE = "the tall red bird sat near a blue door while seven old boats went past the green hill"


@dataclass(frozen=True)
class AttentionHeads(Result):
    """Scores of every head, 0..1.

    Attributes:
        text: kind -> [layer head], on the repeated passage.
        image: kind -> [layer head], among the tokens of the repeated picture, and "image attention" and "image sink"
            for the positions after it. Empty if there was no picture.
        even_text, even_image: kind -> score of a head that attends evenly to all visible keys.
        model_name: name of the model.
    """

    text: Mapping[str, Float[Tensor, "layer head"]]
    image: Mapping[str, Float[Tensor, "layer head"]]
    even_text: Mapping[str, float]
    even_image: Mapping[str, float]
    model_name: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row per head: its scores, on text and on images."""
        n_layers, n_heads = next(iter(self.text.values())).shape
        table = pd.DataFrame({"layer": layer, "head": head} for layer in range(n_layers) for head in range(n_heads))
        for where, scores in (("text", self.text), ("image", self.image)):
            for kind, values in scores.items():
                table[kind if kind.startswith("image") else f"{kind}, {where}"] = values.flatten().tolist()
        return table

    def sharing(self, top: float = 0.1) -> pd.DataFrame:
        """One row per kind: are the best heads on text also the best among image tokens?

        Args:
            top: share of all heads that counts as the best.
        Returns:
            rank_correlation (Spearman, over heads); best_text, best_image: the best head's score; even_text, even_image: the
            score of an even spread; best_heads: number of best heads; best_on_both: how many are the same on text and image;
            by_chance: how many would be the same by chance.
        Raises:
            ValueError: the heads were not scored on an image.
        """
        if not self.image:
            raise ValueError("these heads were scored on text only: call detect_heads with a picture.")
        rows = []
        for kind in KINDS:
            text, image = (pd.Series(scores[kind].flatten().tolist()) for scores in (self.text, self.image))
            n = max(1, round(top * len(text)))
            both = set(text.nlargest(n).index) & set(image.nlargest(n).index)
            rows.append(
                {
                    "kind": kind,
                    "rank_correlation": text.rank().corr(image.rank()),
                    "best_text": text.max(),
                    "even_text": self.even_text[kind],
                    "best_image": image.max(),
                    "even_image": self.even_image[kind],
                    "best_heads": n,
                    "best_on_both": len(both),
                    "by_chance": n * n / len(text),
                }
            )
        return pd.DataFrame(rows)

    def plot(self, path: Any = None) -> Any:
        """One scatter plot per kind, a point per head: score on text against score among image tokens."""
        from analyses.views.compare import heads_plot

        return heads_plot(self, path)


@torch.no_grad()
def detect_heads(model: Model, passage: str = PASSAGE, picture: Any = None) -> AttentionHeads:
    """Scores the heads of any TransformerLens model on text, and the heads of a HookedQwen2VL also on a picture.

    Args:
        passage: a text; the prompt has it twice.
        picture: a PIL image; the prompt has it twice.
    Raises:
        ValueError: a picture for a model that takes no images.
    """
    tokens = text_tokens(model, f" {passage} {passage}")
    patterns = {kind: pattern(tokens.cpu()) for kind, pattern in KINDS.items()}
    text, image, even_image = _scores(model, tokens, patterns), {}, {}
    if picture is not None:
        if not hasattr(model, "to_inputs"):
            raise ValueError(f"{type(model).__name__} takes no images: leave picture=None.")
        inputs = model.encode(model.to_inputs("What is this?", images=[picture, picture]))
        image, even_image = _image_scores(model, inputs)
    return AttentionHeads(text, image, _even(patterns), even_image, str(model.cfg.model_name))


def text_tokens(model: Model, text: str) -> Int[Tensor, "1 pos"]:
    """The token ids of a text, with the special tokens that the tokenizer adds; special tokens spelt in the text are read as text."""
    return model.tokenizer(text, return_tensors="pt", split_special_tokens=True)["input_ids"].to(model.cfg.device)


def _image_scores(model: Model, inputs: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    first, second = inputs.positions("image[0]"), inputs.positions("image[1]")
    image = torch.cat((first, second))
    after = torch.arange(int(image.max()) + 1, inputs.shape[1])
    places = _places(inputs, first, second)
    both_in_image = torch.zeros(inputs.shape[1], inputs.shape[1])
    both_in_image[image[:, None], image] = 1
    patterns = {kind: pattern(places) * both_in_image for kind, pattern in KINDS.items()}
    patterns["image attention"] = torch.zeros_like(both_in_image)
    patterns["image attention"][after[:, None], image] = 1

    def sink(attention: Float[Tensor, "head pos key_pos"]) -> dict[str, Float[Tensor, "head"]]:
        return {"image sink": attention[:, after][:, :, image].mean(1).max(-1).values}

    scores, even = _scores(model, inputs, patterns, sink), _even(patterns)
    return scores, even | {"image sink": even["image attention"] / len(image)}


def _places(inputs: Any, first: Tensor, second: Tensor) -> Int[Tensor, "1 pos"]:
    """A token id for every position; only image tokens at the same place of the picture share an id."""
    ids = torch.arange(inputs.shape[1])
    ids[second] = ids[first]
    return ids[None]


def _even(patterns: Mapping[str, Float[Tensor, "pos key_pos"]]) -> dict[str, float]:
    """Each pattern's score for a head that attends evenly to all visible keys."""
    n = len(next(iter(patterns.values())))
    spread = torch.ones(n, n).tril()
    spread = spread / spread.sum(-1, keepdim=True)
    return {kind: _share(spread, pattern) for kind, pattern in patterns.items()}


def _share(attention: Float[Tensor, "pos key_pos"], pattern: Float[Tensor, "pos key_pos"]) -> float:
    """The share of attention that is on the pattern, over the queries for which the pattern has a key."""
    share = compute_head_attention_similarity_score(attention, pattern, exclude_bos=False, exclude_current_token=False, error_measure="mul")
    return share * len(pattern) / int(pattern.any(-1).sum())  # from a mean over all queries to one over queries with a key


def _scores(
    model: Model, prompt: Any, patterns: Mapping[str, Float[Tensor, "pos key_pos"]], look: Any = None
) -> dict[str, Float[Tensor, "layer head"]]:
    """kind -> [layer head], the scores of all heads in one forward; attention patterns are not kept."""

    def score(attention: Float[Tensor, "1 head pos key_pos"]) -> dict[str, Float[Tensor, "head"]]:
        attention = attention[0].float().cpu()
        found = {kind: torch.tensor([_share(values, pattern) for values in attention]) for kind, pattern in patterns.items()}
        return found if look is None else found | look(attention)

    with attention_patterns(model, score) as scores:
        model(prompt, return_type=None)
    return {kind: torch.stack([of_layer[kind] for of_layer in scores.values()]) for kind in scores[0]}
