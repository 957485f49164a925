"""A patching sweep between two images with bare hooks on transformers' model, and mistakes that run without an error.

Run by why.py; alone: python why_hf_hooks.py FOLDER, where why.py has left prompts.pt.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from transformers import DynamicCache, Qwen2VLForConditionalGeneration


def sweep(hf, clean, corrupted, right, wrong):
    """[layer pos] logit difference with the clean stream before a block put into the corrupted run."""
    layers = hf.model.language_model.layers
    kept = {}

    def keep(index):
        def hook(module, args):
            kept[index] = args[0].clone()

        return hook

    def put(index, position):
        def hook(module, args):
            stream = args[0].clone()
            stream[:, position] = kept[index][:, position]
            return (stream, *args[1:])

        return hook

    handles = [layer.register_forward_pre_hook(keep(l)) for l, layer in enumerate(layers)]
    hf.model.rope_deltas = None
    hf(**clean)
    for handle in handles:
        handle.remove()
    n = corrupted["input_ids"].shape[1]
    effect = torch.zeros(len(layers), n)
    for l, layer in enumerate(layers):
        for position in range(n):
            handle = layer.register_forward_pre_hook(put(l, position))
            try:
                hf.model.rope_deltas = None
                logits = hf(**corrupted).logits[0, -1]
            finally:
                handle.remove()
            effect[l, position] = logits[right] - logits[wrong]
    return effect


# ---- mistakes -----------------------------------------------------------------------------------------


def mistakes(hf, clean, corrupted, other, right, wrong, effect):
    """name -> (right number, wrong number, what they are); nothing below raises or warns."""
    layers, found = hf.model.language_model.layers, {}

    def difference(logits):
        return float(logits[0, -1, right] - logits[0, -1, wrong])

    def fresh(batch):
        hf.model.rope_deltas = None
        return hf(**batch)

    baseline = difference(fresh(clean).logits)
    found["image dropped"] = (baseline, difference(hf(input_ids=clean["input_ids"], attention_mask=clean["attention_mask"]).logits),
                              "logit difference of the clean prompt, pixel_values left out")  # fmt: skip

    merged = {}
    handle = layers[0].register_forward_pre_hook(lambda module, args: merged.update(x=args[0].clone()))
    fresh(clean)
    handle.remove()
    positions = hf.model.get_rope_index(clean["input_ids"], mm_token_type_ids=clean["mm_token_type_ids"],
                                        image_grid_thw=clean["image_grid_thw"], attention_mask=clean["attention_mask"])[0]  # fmt: skip
    hf.model.rope_deltas = None
    found["embeddings reused, no positions"] = (
        difference(hf(inputs_embeds=merged["x"].clone(), position_ids=positions).logits),
        difference(hf(inputs_embeds=merged["x"].clone()).logits),
        "logit difference of the clean prompt, its merged embeddings passed as inputs_embeds",
    )

    def step(between):
        cache = DynamicCache()
        hf.model.rope_deltas = None
        first = hf(**clean, past_key_values=cache).logits[0, -1].argmax()
        if between is not None:
            hf(**between)
        return hf(input_ids=first.view(1, 1), past_key_values=cache).logits[0, -1]

    alone, after = step(None), step(other)
    found["another prompt's rope_deltas"] = (
        0.0, float((after - alone).abs().max()),
        "largest change of the next token's logits when an image of another size ran in between",
    )  # fmt: skip

    states = fresh({**clean, "output_hidden_states": True}).hidden_states
    logits = fresh(clean).logits
    norm, head = hf.model.language_model.norm, hf.lm_head
    twice = head(norm(states[-1]))
    share = float((twice.argmax(-1) != logits.argmax(-1)).float().mean())
    found["last hidden state normed again"] = (
        0.0, float((twice.softmax(-1) - logits.softmax(-1)).abs().max()),
        f"largest error of a probability at the last layer; the top token differs at {share:.0%} of the positions; "
        f"the norm's weight varies by {float(norm.weight.std() / norm.weight.mean()):.0%} of its mean",
    )  # fmt: skip

    embeds = merged["x"].clone()
    before = difference(hf(inputs_embeds=embeds, position_ids=positions).logits)

    def in_place(module, args):
        args[0][:, -1] = 0  # an ablation written into the stream that came in

    handle = layers[0].register_forward_pre_hook(in_place)
    hf(inputs_embeds=embeds, position_ids=positions)
    handle.remove()
    found["in-place edit of embeddings that are reused"] = (
        before, difference(hf(inputs_embeds=embeds, position_ids=positions).logits),
        "logit difference of the unedited run, before and after a run with a hook, since removed",
    )  # fmt: skip

    kept = {}
    handle = layers[2].register_forward_hook(lambda module, args, output: kept.update(x=output.clone()))
    fresh(clean)
    handle.remove()
    position = int((effect[3] - effect[3, 0]).abs().argmax())  # where there is most to see

    def tuple_idiom(module, args, output):
        output[0][:, position] = kept["x"][0][:, position]

    handle = layers[2].register_forward_hook(tuple_idiom)
    found["output[0][:, position] on a tensor"] = (
        float(effect[3, position]), difference(fresh(corrupted).logits),
        f"cell (layer 3, position {position}) of the sweep",
    )  # fmt: skip
    handle.remove()
    return found


@torch.no_grad()
def main(folder):
    torch.set_num_threads(1)
    prompts = torch.load(Path(folder) / "prompts.pt")
    hf = Qwen2VLForConditionalGeneration.from_pretrained(prompts["model"], dtype=torch.float32).eval()
    case = prompts["clean"], prompts["corrupted"], prompts["right"], prompts["wrong"]
    start = time.process_time()
    effect = sweep(hf, *case)
    seconds = time.process_time() - start
    found = None
    if "--mistakes" in sys.argv:
        found = mistakes(hf, prompts["clean"], prompts["corrupted"], prompts["other"], *case[2:], effect)
    torch.save({"effect": effect, "seconds": seconds, "mistakes": found}, Path(folder) / "hf_hooks.pt")


if __name__ == "__main__":
    main(sys.argv[1])
