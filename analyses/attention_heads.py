"""Attention heads by what they attend to, on text and among image tokens: are they the same heads?

1. Text: a passage twice over. Image: one picture twice over, whose tokens are called by their place in the picture, so
   that previous token, duplicate token and induction mean among image tokens what they mean among words.
2. The pattern of each kind is TransformerLens's own (`head_detector`: previous token; the same token before;
   the token after the same token before).
3. Score: the share of a head's attention that lies on the pattern, over the queries that have one (ours:
   `detect_head` divides by the attention of all queries, so that even a perfect induction head has at most half).
4. Positions after the pictures: the share of attention on their tokens, and on the single image token that gets
   most of it (a sink, if it is far above an even spread).
5. Beside every score stands that of a head which spreads its attention evenly over all it can see: in a short passage
   that is not small, and a score below it is no sign of the kind.

All image placeholders have one token id: `detect_head` itself, on a prompt with an image, takes any attention from image
token to image token for duplicate tokens. Here every place of a picture has an id of its own.

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
        image: kind -> [layer head], among the tokens of the repeated picture; and "image attention" and "image sink",
            of the positions after it. Empty for a model that sees no images.
        even_text, even_image: the same kinds, of a head that attends evenly to everything before it.
        model_name: of the model.
    """

    text: Mapping[str, Float[Tensor, "layer head"]]
    image: Mapping[str, Float[Tensor, "layer head"]]
    even_text: Mapping[str, float]
    even_image: Mapping[str, float]
    model_name: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row a head: its scores, on text and on images."""
        n_layers, n_heads = next(iter(self.text.values())).shape
        table = pd.DataFrame({"layer": layer, "head": head} for layer in range(n_layers) for head in range(n_heads))
        for where, scores in (("text", self.text), ("image", self.image)):
            for kind, values in scores.items():
                table[kind if kind.startswith("image") else f"{kind}, {where}"] = values.flatten().tolist()
        return table

    def sharing(self, top: float = 0.1) -> pd.DataFrame:
        """One row a kind: do the heads that do it on text do it among image tokens?

        Args:
            top: share of the heads that counts as the kind's best.
        Returns:
            rank_correlation (Spearman, over heads); the best head's score and that of an even spread, on each; the
            number of best heads, how many of them are best on both, and how many would be by chance.
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
        """A scatter of heads for each kind: score on text against score among image tokens."""
        from analyses.views.compare import heads_plot

        return heads_plot(self, path)


@torch.no_grad()
def detect_heads(model: Model, passage: str = PASSAGE, picture: Any = None) -> AttentionHeads:
    """Scores the heads of any TransformerLens model on text, and those of a HookedQwen2VL on a picture as well.

    Args:
        passage: text that is shown twice over, in the model's own tokens.
        picture: a PIL image that is shown twice over.
    Raises:
        ValueError: a picture for a model that sees none.
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
    """A text as the model's own tokenizer has it, with the special tokens that it adds itself and no others: what looks like one
    in the text is text."""
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
    """Ids in which only the places of the picture repeat."""
    ids = torch.arange(inputs.shape[1])
    ids[second] = ids[first]
    return ids[None]


def _even(patterns: Mapping[str, Float[Tensor, "pos key_pos"]]) -> dict[str, float]:
    """Each pattern's share of attention that is spread evenly over all visible keys."""
    n = len(next(iter(patterns.values())))
    spread = torch.ones(n, n).tril()
    spread = spread / spread.sum(-1, keepdim=True)
    return {kind: _share(spread, pattern) for kind, pattern in patterns.items()}


def _share(attention: Float[Tensor, "pos key_pos"], pattern: Float[Tensor, "pos key_pos"]) -> float:
    """The pattern's share of attention, over the queries for which it has a key."""
    share = compute_head_attention_similarity_score(attention, pattern, exclude_bos=False, exclude_current_token=False, error_measure="mul")
    return share * len(pattern) / int(pattern.any(-1).sum())  # rows sum to 1: from all queries to those with a key


def _scores(
    model: Model, prompt: Any, patterns: Mapping[str, Float[Tensor, "pos key_pos"]], look: Any = None
) -> dict[str, Float[Tensor, "layer head"]]:
    """Each pattern's share of the attention of the queries it has keys for, by head; patterns are not kept."""

    def score(attention: Float[Tensor, "1 head pos key_pos"]) -> dict[str, Float[Tensor, "head"]]:
        attention = attention[0].float().cpu()
        found = {kind: torch.tensor([_share(values, pattern) for values in attention]) for kind, pattern in patterns.items()}
        return found if look is None else found | look(attention)

    with attention_patterns(model, score) as scores:
        model(prompt, return_type=None)
    return {kind: torch.stack([of_layer[kind] for of_layer in scores.values()]) for kind in scores[0]}
