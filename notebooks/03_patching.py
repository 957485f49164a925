# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Where is the information that decides the answer, layer by layer?
#
# Two images that differ in one object, one question, two right answers. The activations of the first image are put into the run
# on the second, one place at a time. Where the answer comes back, the information was. The model is the embedded one, a small
# Qwen2-VL trained on generated scenes; one constant switches to a published model.

# %%
# On Colab and Kaggle this installs the package, and takes the published model where there is a GPU; elsewhere it does nothing.
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("hooked_qwen2vl") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "hooked-qwen2vl[adapters]"], check=True)
import torch

HOSTED = any(name in os.environ for name in ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"))
PUBLISHED = "Qwen/Qwen2-VL-2B-Instruct" if HOSTED and torch.cuda.is_available() else None
DEVICE = "cuda" if PUBLISHED else "cpu"

# %%
MODEL = PUBLISHED or "scenes"  # the embedded model, or any checkpoint

# %matplotlib inline
import pandas as pd
from IPython.display import display
from transformer_lens.patching import generic_activation_patch, layer_pos_patch_setter

from analyses.counterfactuals import check_pairs, scene_candidates
from analyses.patching import patch_sweep, recovery
from analyses.views.patching import recovery_map, recovery_on_image
from hooked_qwen2vl import HookedQwen2VL

torch.set_grad_enabled(False)
model = HookedQwen2VL.from_pretrained(MODEL, dtype="float32", device=DEVICE)

# %% [markdown]
# A pair is used only if the model answers both of its prompts rightly; what is refused keeps its reason.

# %%
pairs = check_pairs(model, scene_candidates(20, seed=3, domain="shapes", category="attribute", grid=(6, 6)), n=1)
(pair,) = pairs
display(pair.source.clean, pair.source.corrupted)
print(pair.source.question, "→", pair.source.answer, "/", pair.source.other, "; refused before it:", pairs.reasons or "none")
print(f"logit difference, clean {pair.clean_difference:+.2f}, corrupted {pair.corrupted_difference:+.2f}")

# %% [markdown]
# The residual stream before every block, at every position. 1: the clean answer is back. 0: no effect.

# %%
prompts = (model, pair.clean, pair.corrupted, pair.metric)
clean_metric = torch.tensor([pair.clean_difference])
sweep = patch_sweep(*prompts, progress=False)
shares = recovery(sweep, clean_metric)["mean_of_ratios"]
layers, image = range(model.cfg.n_layers), pair.clean.positions("image").tolist()
words = model.to_str_tokens(pair.clean.tokens[0])
cols = pair.clean.grid()[1]
labels = [
    f"{image.index(place) // cols + 1},{image.index(place) % cols + 1}" if place in image else word for place, word in enumerate(words)
]
recovery_map(shares, layers, labels, f"{pair.source.question} {pair.source.answer} / {pair.source.other}; image tokens as row,column")

# %% [markdown]
# The same on the image. Fixed before looking: the place that matters most in the early layers should be the object.

# %%
best = int(shares[: model.cfg.n_layers // 4 + 1].mean(0).argmax())
print(f"{labels[best]} (row,column) matters most; the object covers {', '.join(labels[place] for place in pair.on_boxes.tolist())}")
recovery_on_image(shares[:, image].unflatten(-1, pair.clean.grid()), layers, [pair.source.clean, pair.source.corrupted])

# %% [markdown]
# TransformerLens's own loop runs the whole model for every cell. On a few cells, the same numbers:

# %%
cells = pd.DataFrame(
    [(layer, place) for layer in (0, len(layers) // 2, len(layers) - 1) for place in (best, len(words) - 1)], columns=["layer", "pos"]
)
_, cache = model.run_with_cache(pair.clean)
cells["TransformerLens"] = generic_activation_patch(
    model, pair.corrupted, cache, pair.metric, layer_pos_patch_setter, "resid_pre", index_df=cells[["layer", "pos"]], reduce="mean"
).tolist()
cells["patch_sweep"] = [float(sweep.values[layer, place]) for layer, place in zip(cells["layer"], cells["pos"])]
assert (cells["TransformerLens"] - cells["patch_sweep"]).abs().max() < 1e-3
cells

# %% [markdown]
# A single position is not the whole of a place: an object covers several. Rows can be named spans, patched whole.

# %%
own = pair.on_boxes.tolist()
spans = {
    "the object": own,
    "rest of the image": [place for place in image if place not in own],
    "question": "question",
    "last position": "last",
}
by_span = recovery(patch_sweep(*prompts, positions=spans, progress=False), clean_metric)["mean_of_ratios"]
pd.DataFrame(by_span.T.tolist(), index=list(spans), columns=[f"layer {layer}" for layer in layers]).map("{:z.2f}".format)

# %% [markdown]
# The vision tower too: its residual stream, image token by image token, before each of its blocks.

# %%
tower = patch_sweep(*prompts, "vision_encoder.resid_pre", progress=False)
in_tower = recovery(tower, clean_metric)["mean_of_ratios"]
recovery_on_image(in_tower.unflatten(-1, pair.clean.grid()), range(len(in_tower)), [pair.source.clean, pair.source.corrupted])

# %% [markdown]
# **What was learnt.** On the embedded model:
#
# The object's patches still give back more than half at layer 3; the last position does from layer 4 on.
# The object's patches give back 1.00 at layer 0, the rest of the image 0.00.
# The question's tokens give back 0.01 at most, at any layer.
#
# The first row of the table says until which layer the answer is read from the object's patches, the last row from which layer on the
# last position has it. One pair is an example; `hooked-qwen2vl patch --data scenes` asks many, and docs/flips.md says what it found.

# %%
arrives = int((by_span[:, -1] > 0.5).float().argmax())
leaves = int((by_span[:, 0] > 0.5).nonzero().max())
print(f"The object's patches still give back more than half at layer {leaves}; the last position does from layer {arrives} on.")
print(f"The object's patches give back {by_span[0, 0]:.2f} at layer 0, the rest of the image {float(by_span[0, 1]):z.2f}.")
print(f"The question's tokens give back {float(by_span[:, 2].max()):z.2f} at most, at any layer.")
