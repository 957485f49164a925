"""The same sweep here: with TransformerLens's own function, and with the exact fast one; and the same mistakes.

Run by why.py; alone: python why_ours.py FOLDER, where why.py has left prompts.pt.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from transformer_lens import patching

from analyses.patching import patch_sweep
from hooked_qwen2vl import HookedQwen2VL, Inputs


def sweep(model, clean, corrupted, right, wrong):
    """[layer pos] logit difference with the clean stream before a block put into the corrupted run."""
    clean, corrupted = (Inputs.from_processor(batch, model.cfg) for batch in (clean, corrupted))
    return patch_sweep(model, clean, corrupted, lambda logits: logits[:, -1, right] - logits[:, -1, wrong]).values[..., 0]


def sweep_of_transformer_lens(model, clean, corrupted, right, wrong):
    """The same by `transformer_lens.patching`, which runs the whole model for every cell."""
    clean, corrupted = (model.encode(Inputs.from_processor(batch, model.cfg)) for batch in (clean, corrupted))
    _, cache = model.run_with_cache(clean, names_filter=lambda name: name.endswith("hook_resid_pre"))
    return patching.get_act_patch_resid_pre(model, corrupted, cache, lambda logits: logits[0, -1, right] - logits[0, -1, wrong])


# ---- mistakes -----------------------------------------------------------------------------------------


def mistakes(model, clean, corrupted, other, right, wrong, effect):
    """name -> (right number, wrong number or the error's text, what they are)."""
    found = {}
    inputs, target, between = (model.encode(Inputs.from_processor(batch, model.cfg)) for batch in (clean, corrupted, other))

    def difference(logits):
        return float(logits[0, -1, right] - logits[0, -1, wrong])

    def error(call):
        try:
            return difference(call())
        except (ValueError, TypeError) as refusal:
            return f"{type(refusal).__name__}: {refusal}"

    baseline = difference(model(inputs))
    found["image dropped"] = (baseline, error(lambda: model(inputs.tokens)), "")
    stream = model(inputs, stop_at_layer=0)
    found["embeddings reused, no positions"] = (baseline, error(lambda: model(stream, start_at_layer=0)), "")

    def generated(run_between):
        longer = model.generate(inputs, max_new_tokens=1, do_sample=False, stop_at_eos=False, return_type="inputs", verbose=False)
        if run_between:
            model(between)
        return model(longer)[0, -1]

    found["another prompt's rope_deltas"] = (0.0, float((generated(True) - generated(False)).abs().max()), "")
    stack = model.run_with_cache(inputs)[1].accumulated_resid(apply_ln=True)
    lens, logits = stack[-1] @ model.W_U, model(inputs)
    found["last hidden state normed again"] = (
        0.0, float((lens.softmax(-1) - logits.softmax(-1)).abs().max()), "",
    )  # fmt: skip

    def in_place(activation, hook):
        activation[:, -1] = 0
        return activation

    model.run_with_hooks(inputs, fwd_hooks=[("blocks.0.hook_resid_pre", in_place)])
    model.run_with_hooks(stream, inputs=inputs, start_at_layer=0, fwd_hooks=[("blocks.0.hook_resid_pre", in_place)])
    after = difference(model(stream, inputs=inputs, start_at_layer=0))
    found["in-place edit of embeddings that are reused"] = (baseline, after, "")
    position = int((effect[3] - effect[3, 0]).abs().argmax())
    name = "blocks.2.hook_resid_post"
    kept = model.run_with_cache(inputs, names_filter=name)[1][name]

    def tuple_idiom(activation, hook):
        activation[0][:, position] = kept[0][:, position]
        return activation

    wrong_cell = difference(model.run_with_hooks(target, fwd_hooks=[(name, tuple_idiom)]))
    found["output[0][:, position] on a tensor"] = (float(effect[3, position]), wrong_cell, "")
    return found


@torch.no_grad()
def main(folder):
    torch.set_num_threads(1)
    prompts = torch.load(Path(folder) / "prompts.pt")
    model = HookedQwen2VL.from_pretrained(prompts["model"], dtype=torch.float32)
    case = prompts["clean"], prompts["corrupted"], prompts["right"], prompts["wrong"]
    result = {}
    for name, function in (("ours", sweep), ("transformer_lens", sweep_of_transformer_lens)):
        start = time.process_time()
        effect = function(model, *case)
        result[name] = {"effect": effect, "seconds": time.process_time() - start}
    found = None
    if "--mistakes" in sys.argv:
        found = mistakes(model, prompts["clean"], prompts["corrupted"], prompts["other"], *case[2:], result["ours"]["effect"])
    torch.save(result | {"mistakes": found}, Path(folder) / "ours.pt")


if __name__ == "__main__":
    main(sys.argv[1])
