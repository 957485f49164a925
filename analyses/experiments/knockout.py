"""Which flows of information do the answers to a data set need? Attention knockout over windows of layers.

Flows: image → last, image → question, question → last, and from the image tokens of the object asked about to everything after
the image, compared with as many other image tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from random import Random
from typing import Any

import torch
from tqdm.auto import tqdm

from analyses.data.examples import Example, image_key
from analyses.knockout import Knockout, attention_knockout
from analyses.runs.engine import opened
from hooked_qwen2vl.prompt_text import text_ids
from hooked_qwen2vl.protocols import Model


@torch.no_grad()
def knockout_study(model: Model, examples: Iterable[Example], window: int | None = None, seed: int = 0, progress: bool = True) -> Knockout:
    """Blocks flows for every item whose objects are known and whose answer is a single token that the model predicts.

    Flows: image → last, image → question, question → last, and to everything after the image: from the object's image tokens,
    and from as many other image tokens drawn at random.

    Returns:
        the effects; `left_out` counts the items that could not be used, by reason.
    Raises:
        ValueError: no item could be used.
    """
    done: list[Knockout] = []
    left_out: Counter[str] = Counter()
    for example in tqdm(examples, desc="knockout", unit="item", disable=not progress, delay=2):
        try:
            inputs = model.encode(model.to_inputs(example.question, images=list(opened(example).images)))
        except (ValueError, OSError) as error:
            left_out[f"{example.id}: {error}"] += 1
            continue
        tokens = text_ids(model.tokenizer, example.answer)
        found = _flows(inputs, example, seed)
        if len(tokens) != 1 or isinstance(found, str):
            left_out[found if isinstance(found, str) else "the answer is not a single token"] += 1
            continue
        one = attention_knockout(model, inputs, tokens, found, window, progress=False)
        done.append(replace(one, images=(image_key(example),) * len(one.baseline)))
    if not done:
        raise ValueError(f"no item could be used: {dict(left_out) or 'there are none'}.")
    return replace(Knockout.join(done), left_out=dict(left_out))


def _flows(inputs: Any, example: Example, seed: int) -> dict[str, tuple[Any, Any]] | str:
    """The flows to block, or the reason why the item cannot be used."""
    things = example.item.depends_on if example.item is not None else ()
    own = sorted({place for thing in things for place in inputs.positions(thing.box).tolist()})
    if not own:
        return "no object that the answer depends on is known"
    image = inputs.positions("image").tolist()
    others = [place for place in image if place not in own]
    if len(own) > len(others):
        return "the object covers more than half of the image"
    after = list(range(image[-1] + 1, inputs.shape[1]))
    control = sorted(Random(f"{seed} {example.id}").sample(others, len(own)))
    return {
        "image → last": ("image", "last"),
        "image → question": ("image", "question"),
        "question → last": ("question", "last"),
        "object → all after": (own, after),
        "as many other patches → all after": (control, after),
    }
