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
# The logit lens reads the residual stream after every block as if the model stopped there. One constant
# switches from the embedded model to the real one.

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
import pandas as pd
from IPython.display import display

from analyses.logit_lens import logit_lens
from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.scenes import sample

torch.set_grad_enabled(False)
model = HookedQwen2VL.from_pretrained(MODEL)
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

# %% [markdown]
# The same, as a page of circuitsvis, which needs no network: the last expression of a cell shows itself.

# %%
lens.page(images=[item.image])

# %% [markdown]
# And at every image token.

# %%
image_lens = logit_lens(model, inputs, positions="image[0]")
image_lens.plot_image(item.image)

# %% [markdown]
# **What was learnt.** On the embedded model:
#
# The answer is the top token from layer 4 of 8 on, with probability 0.89 there and 1.00 at the end.
# %%
ranks, probs = lens.target_ranks[:, 0, 0], lens.target_probs[:, 0, 0]
display(pd.DataFrame({"layer": lens.layer_labels, "top token": [tops[0][0] for tops in lens.top_tokens], "rank of the answer (0: on top)": ranks,
                      "its probability": probs, "entropy, nats": lens.entropy[:, 0]}).round(3))  # fmt: skip
L = model.cfg.n_layers
stays = next(layer for layer in range(L + 1) if not ranks[layer:].any())
print(
    f"The answer is the top token from layer {stays} of {L} on, with probability {probs[stays]:.2f} there and {probs[-1]:.2f} at the end."
)
