# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Where in the vision tower does a patch begin to know its object?
#
# Two pictures differ in one object's colour. At every block of the tower: how far apart are the two runs, patch by
# patch? Where only the object's own patches differ, a patch knows itself; where others differ too, it has been told.
# One constant switches from the embedded model to the real one.

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

# %%
MODEL = PUBLISHED or "scenes"  # the embedded model, or any checkpoint

# %matplotlib inline
from IPython.display import display

from analyses.explorer import explore
from analyses.views.attention import maps_on_image
from hooked_qwen2vl import HookedQwen2VL, cache_image
from hooked_qwen2vl.scenes import counterfactual_pairs

torch.set_grad_enabled(False)
model = HookedQwen2VL.from_pretrained(MODEL)
item, partner = counterfactual_pairs(1, seed=29, domain="shapes", category="attribute", grid=(6, 6))[0]
display(item.image, partner.image)
print(item.question, "→", item.answer, "/", partner.answer)

# %% [markdown]
# The tower's activations come packed in its own order; `cache_image` gives them back as rows and columns of 14-pixel
# patches.

# %%
pair = [model.to_inputs(item.question, images=[picture.image]) for picture in (item, partner)]
caches = [model.run_with_cache(inputs, vision=True)[1] for inputs in pair]
names = [f"vision_encoder.blocks.{layer}.hook_resid_post" for layer in range(model.cfg.vision.n_layers)]


def distance(name):
    """Relative distance of the two runs at every patch: 0 where the tower cannot tell the pictures apart."""
    ours, theirs = (cache_image(cache, name, inputs) for cache, inputs in zip(caches, pair))
    return (ours - theirs).norm(dim=-1) / ours.norm(dim=-1)


apart = torch.stack([distance(name) for name in names])
rows, cols = apart.shape[1:]
maps_on_image({"relative distance\nof the two runs": apart.flatten(1)}, (rows, cols), item.image, title="Vision tower, block by block")

# %% [markdown]
# How much of the difference is outside the object: its share of the summed squared distance, block by block.

# %%
x0, y0, x1, y1 = (edge * size for edge, size in zip(item.depends_on[0].box, [1 / item.image.width, 1 / item.image.height] * 2))
inside = torch.zeros(rows, cols, dtype=torch.bool)
inside[round(y0 * rows) : round(y1 * rows), round(x0 * cols) : round(x1 * cols)] = True
squared = apart.pow(2)
outside = squared[:, ~inside].sum(1) / squared.flatten(1).sum(1)
for layer, share in enumerate(outside.tolist()):
    print(f"after block {layer}: {100 * share:.1f} % of the difference lies outside the object")

# %% [markdown]
# The decoder reads what the projector makes of it: attention from the position that predicts the answer to the image.

# %%
inputs = model.generate(model.encode(pair[0]), max_new_tokens=4, do_sample=False, return_type="inputs")
result = explore(model, inputs, [item.image], question=item.question)
result.plot_heads()

# %% [markdown]
# **What was learnt.** The table says how soon the change leaks out of its object, and at which block most patches have
# heard of it; the heads say where the decoder still looks for it. One pair is an example, not a rate.

# %%
print(f"least outside: after block {int(outside.argmin())}, most: after block {int(outside.argmax())}")
assert outside.isfinite().all()
