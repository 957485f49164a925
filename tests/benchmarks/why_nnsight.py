"""The same sweep with nnsight around transformers' model, and the same mistakes where they can be made.

nnsight is no dependency of this project: why.py runs this with the Python of an environment of its own.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from nnsight import NNsight
from transformers import Qwen2VLForConditionalGeneration


def sweep(model, clean, corrupted, right, wrong):
    """[layer pos] logit difference with the clean stream before a block put into the corrupted run."""
    layers, kept = model.model.language_model.layers, []
    with model.trace(**clean):
        for layer in layers:
            kept.append(layer.input.clone().save())
    n = corrupted["input_ids"].shape[1]
    effect = torch.zeros(len(kept), n)
    for l in range(len(kept)):
        for position in range(n):
            with model.trace(**corrupted):
                stream = layers[l].input.clone()
                stream[:, position] = kept[l][:, position]
                layers[l].input = stream
                logits = model.lm_head.output[0, -1].save()
            effect[l, position] = logits[right] - logits[wrong]
    return effect


def mistakes(model, clean, corrupted, right, wrong, effect):
    """name -> (right number, wrong number, what they are); nothing below raises or warns."""
    found = {}

    def difference(**batch):
        with model.trace(**batch):
            logits = model.lm_head.output[0, -1].save()
        return float(logits[right] - logits[wrong])

    bare = {name: clean[name] for name in ("input_ids", "attention_mask")}
    found["image dropped"] = (difference(**clean), difference(**bare), "logit difference of the clean prompt, pixel_values left out")
    layers = model.model.language_model.layers
    with model.trace(**clean):
        kept = layers[2].output.clone().save()
    position = int((effect[3] - effect[3, 0]).abs().argmax())  # where there is most to see
    with model.trace(**corrupted):
        layers[2].output[0][:, position] = kept[0][:, position]
        logits = model.lm_head.output[0, -1].save()
    found["output[0][:, position] on a tensor"] = (
        float(effect[3, position]), float(logits[right] - logits[wrong]), f"cell (layer 3, position {position}) of the sweep",
    )  # fmt: skip
    return found


@torch.no_grad()
def main(folder):
    torch.set_num_threads(1)
    prompts = torch.load(Path(folder) / "prompts.pt")
    hf = Qwen2VLForConditionalGeneration.from_pretrained(prompts["model"], dtype=torch.float32).eval()
    model = NNsight(hf)
    case = prompts["clean"], prompts["corrupted"], prompts["right"], prompts["wrong"]
    start = time.process_time()
    effect = sweep(model, *case)
    seconds = time.process_time() - start
    found = mistakes(model, *case, effect) if "--mistakes" in sys.argv else None
    torch.save({"effect": effect, "seconds": seconds, "mistakes": found}, Path(folder) / "nnsight.pt")


if __name__ == "__main__":
    main(sys.argv[1])
