# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Which neurons serve one visual domain, and does the domain need them?
#
# MMNeuron's selection by firing, judged on other images, beside random neurons of the same number in the same layers. The
# command `hooked-qwen2vl neurons` does the same at a larger scale and writes tables and pictures.

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
DATA, TEST = "scenes:train", "scenes:test"

# %matplotlib inline
import math

from IPython.display import display

from analyses.data import examples
from analyses.domain_neurons import count_firings, disable_neurons
from analyses.experiments.max_activating import top_images, written_tokens
from analyses.experiments.neurons import ablate, conditions, prepare
from hooked_qwen2vl import HookedQwen2VL

torch.set_grad_enabled(False)
model = HookedQwen2VL.from_pretrained(MODEL)

# %% [markdown]
# Counting is one forward an example; the counts are all that the selection needs.

# %%
counts = count_firings(model, DATA, limit=60, batch_size=10, progress=False)
neurons = counts.select()
neurons.plot()

# %% [markdown]
# How specific are they? The entropy of a neuron that fires alike in all domains is ln K.

# %%
print(f"ln K = {math.log(len(neurons.domains)):.3f} nats")
neurons.to_dataframe().groupby("module")["dape_nats"].describe()[["count", "min", "max"]]

# %% [markdown]
# Do image tokens alone select the same neurons?

# %%
on_images = counts.select(sources=["image"])
both = neurons.modules["decoder"].selected & on_images.modules["decoder"].selected
print(f"{int(both.sum())} of {int(neurons.modules['decoder'].selected.sum())} decoder neurons")

# %% [markdown]
# Switched off, on test images: few questions here, so that the cell is quick; the command asks more.

# %%
batches = prepare(model, examples(TEST, limit=10))
wanted = [c for c in conditions(neurons, seeds=1) if c.module == "all"]
ablations = ablate(model, batches, wanted, crossed=(), progress=False)
ablations.against_controls()[["control", "domain", "items", "neurons", "excess_log_prob", "excess_log_prob_low", "excess_log_prob_high"]]

# %% [markdown]
# One neuron: the pictures that fire it, where, and the words it writes.

# %%
table = neurons.to_dataframe().query("module == 'decoder'").sort_values("dape_nats")
neuron = ("decoder", int(table["layer"].iloc[0]), int(table["neuron"].iloc[0]))
display(written_tokens(model, neuron, top_k=5))
top_images(model, neuron, TEST, limit=30, n=3).plot()

# %% [markdown]
# Switching off is a context: plain runs, caches and generation.

# %%
with disable_neurons(model, [neuron]):
    print(model.generate(batches[0].inputs[0], max_new_tokens=4, do_sample=False, return_type="str", verbose=False))

# %% [markdown]
# **What was learnt.** The lowest entropies beside ln K say how specific the selected neurons are; the interval of
# `excess_log_prob` says whether a domain needs its own neurons more than others of the same layers. If it holds 0, it
# is not shown.
