"""Which flows of information do the answers to a data set need? Attention knockout over windows of layers.

The flows image → last, image → question, question → last, and to everything after the image: the patches of the object
asked about, beside as many other patches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from random import Random
from typing import Any

import torch
from tqdm.auto import tqdm

from analyses.data.examples import Example, image_key
from analyses.knockout import Knockout, attention_knockout
from hooked_qwen2vl.prompt_text import text_ids


@torch.no_grad()
def knockout_study(
    model: Any, examples: Iterable[Example], window: int | None = None, seed: int = 0, progress: bool = True
) -> Knockout:
    """Blocks flows for every item whose objects are known and whose answer is right and a single token.

    Flows: image → last, image → question, question → last, and to everything after the image: the object's patches, and
    as many other patches of the image drawn at random.

    Raises:
        ValueError: no item could be used.
    """
    done: list[Knockout] = []
    for example in tqdm(examples, desc="knockout", unit="item", disable=not progress, delay=2):
        things = example.item.depends_on if example.item is not None else ()
        inputs = model.encode(model.to_inputs(example.question, images=list(example.images)))
        image = inputs.positions("image").tolist()
        own = sorted({place for thing in things for place in inputs.positions(thing.box).tolist()})
        others = [place for place in image if place not in own]
        tokens = text_ids(model.tokenizer, example.answer)
        if not own or len(own) > len(others) or len(tokens) != 1:
            continue
        after = list(range(image[-1] + 1, inputs.shape[1]))
        control = sorted(Random(f"{seed} {example.id}").sample(others, len(own)))
        flows = {
            "image → last": ("image", "last"),
            "image → question": ("image", "question"),
            "question → last": ("question", "last"),
            "object → all after": (own, after),
            "as many other patches → all after": (control, after),
        }
        one = attention_knockout(model, inputs, tokens, flows, window, progress=False)
        done.append(replace(one, images=(image_key(example),) * len(one.baseline)))
    return Knockout.join(done)
