# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # At which layer does the answer appear?
#
# The logit lens reads the residual stream after every block as if the model stopped there. The model is the embedded one, a
# small Qwen2-VL trained on generated scenes; one constant switches to a published model.

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

from analyses.logit_lens import logit_lens
from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.scenes import sample

torch.set_grad_enabled(False)
model = HookedQwen2VL.from_pretrained(MODEL, dtype="float32", device=DEVICE)
item = sample(1, seed=3, domain="shapes", category="attribute")[0]
display(item.image)
print(item.question, "→", item.answer)

# %%
inputs = model.encode(model.to_inputs(item.question, images=[item.image]))
print(model.generate(inputs, max_new_tokens=5, do_sample=False, return_type="str"))
lens = logit_lens(model, inputs, positions="last", top_k=5, targets=[item.answer])
lens.plot()

# %% [markdown]
# The same, by hand: TransformerLens's own `accumulated_resid`. Its last layer *is* the model's prediction; norming
# HF's last hidden state once more, as notebooks do, is not.

# %%
logits, cache = model.run_with_cache(inputs)
stack = cache.accumulated_resid(apply_ln=True, pos_slice=-1)
assert torch.allclose(stack[-1] @ model.W_U, logits[:, -1], atol=1e-4)
off = float((model.ln_final(stack[-1]) @ model.W_U - logits[:, -1]).abs().max())
print(f"normed once more, the logits are off by up to {off:.2f}")

# %% [markdown]
# The same, as a page of circuitsvis, which needs no network: the last expression of a cell shows itself.

# %%
lens.page(images=[item.image])

# %% [markdown]
# And at every image token: its top token at a few layers, brighter where it is more probable. Nothing is asked there, so it need not
# name what the patch shows.

# %%
image_lens = logit_lens(model, inputs, positions="image[0]")
image_lens.plot_image(item.image)

# %% [markdown]
# **What was learnt.** On the embedded model:
#
# The answer is the top token from layer 4 of 8 on, with probability 0.89 there and 1.00 at the end.
# Of the 4 image tokens on the star, 0 read as its colour at some layer.
# %%
ranks, probs = lens.target_ranks[:, 0, 0], lens.target_probs[:, 0, 0]
display(pd.DataFrame({"layer": lens.layer_labels, "top token": [repr(tops[0][0]) for tops in lens.top_tokens], "rank of the answer (0: on top)": ranks,
                      "its probability": probs, "entropy, nats": lens.entropy[:, 0]}).round(3))  # fmt: skip
L = model.cfg.n_layers
stays = next(layer for layer in range(L + 1) if not ranks[layer:].any())
print(
    f"The answer is the top token from layer {stays} of {L} on, with probability {probs[stays]:.2f} there and {probs[-1]:.2f} at the end."
)
image = inputs.positions("image").tolist()
own = [image.index(place) for place in inputs.positions(item.depends_on[0].box).tolist()]
named = sum(any(tops[place][0].strip() == item.answer for tops in image_lens.top_tokens) for place in own)
print(f"Of the {len(own)} image tokens on the star, {named} read as its colour at some layer.")
