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
# command `hooked-qwen2vl neurons` does the same at a larger scale and writes tables and pictures. The model is the embedded
# one, a small Qwen2-VL trained on generated scenes; one constant switches to a published model.

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
DATA, TEST = "scenes:train", "scenes:test"
ITEMS = 40

# %matplotlib inline
import math

from IPython.display import display

from analyses.data import examples
from analyses.domain_neurons import count_firings, disable_neurons
from analyses.experiments.max_activating import top_images, written_tokens
from analyses.experiments.neurons import FIRING, NONE, RANDOM, RANDOM_RATE, ablate, conditions, prepare
from hooked_qwen2vl import HookedQwen2VL

torch.set_grad_enabled(False)
model = HookedQwen2VL.from_pretrained(MODEL, dtype="float32", device=DEVICE)

# %% [markdown]
# Counting is one forward an example; the counts are all that the selection needs. A neuron that serves several domains counts in each of
# them, in the picture and in its titles.

# %%
counts = count_firings(model, DATA, limit=60, batch_size=10, progress=False)
neurons = counts.select()
neurons.plot()

# %% [markdown]
# How specific are they? The entropy of how often a neuron fires in each of the K domains: 0 if it fires in one only, ln K if it fires
# alike in all.

# %%
print(f"ln K = {math.log(len(neurons.domains)):.3f} nats")
neurons.to_dataframe().groupby("module")["dape_nats"].agg(neurons="count", lowest="min", highest="max").round(3)

# %% [markdown]
# Do image tokens alone select the same neurons? Beside it, what two random choices of the same sizes would share.

# %%
everywhere, on_images = (chosen.modules["decoder"].selected for chosen in (neurons, counts.select(sources=["image"])))
both, by_chance = int((everywhere & on_images).sum()), int(everywhere.sum()) * int(on_images.sum()) / everywhere.numel()
print(f"{both} of {int(everywhere.sum())} decoder neurons; by chance {by_chance:.1f}")

# %% [markdown]
# Switched off, on test images: few questions here, so that the cell is quick; the command asks more. The excess is the
# log-probability of the right answer's first token, own neurons off minus the control's off: below 0, the domain needs its own more.

# %%
batches = prepare(model, examples(TEST, limit=ITEMS))
wanted = [c for c in conditions(neurons, seeds=2) if c.module == "all"]
ablations = ablate(model, batches, wanted, crossed=(), progress=False)
excess = ablations.against_controls()
shown = {"excess_log_prob": "excess, nats", "excess_log_prob_low": "low", "excess_log_prob_high": "high"}
excess.rename(columns=shown)[["control", "domain", "items", "neurons", *shown.values()]].round(3)

# %% [markdown]
# One neuron: the pictures that fire it, where, and the words it writes.

# %%
table = neurons.to_dataframe().query("module == 'decoder'").sort_values("dape_nats")
neuron = ("decoder", int(table["layer"].iloc[0]), int(table["neuron"].iloc[0]))
display(written_tokens(model, neuron, top_k=5))
top_images(model, neuron, TEST, limit=30, n=3).plot()

# %% [markdown]
# Switching off is a context: plain runs, caches and generation. One neuron is not expected to change an answer.

# %%
one = batches[0].inputs[0]
plain = model.generate(one, max_new_tokens=4, do_sample=False, return_type="str", verbose=False)
with disable_neurons(model, [neuron]):
    off = model.generate(one, max_new_tokens=4, do_sample=False, return_type="str", verbose=False)
print(f"{model.to_string(one.tokens[0, one.positions('question')])} → {plain}; with neuron {neuron[2]} of layer {neuron[1]} off: {off}")

# %% [markdown]
# **What was learnt.** On the embedded model:
#
# The most specific neurons have an entropy of 1.594 nats (decoder), 0.000 nats (projector), 1.585 nats (vision); a neuron that fires alike in all 5 domains has 1.609.
# Image tokens alone select 6 of the 31 decoder neurons again; by chance it would be 0.3.
# Of 40 test questions 90 % [77, 96] are answered rightly; with the domain's own neurons off 90 % [77, 96], with as many random ones of the same layers off 89 % [78, 98].
# With the own neurons off rather than the random ones, the right answer's log-probability differs by -0.012 nats [-0.049, 0.025]; rather than random ones that fire as often, by 0.056 nats [-0.028, 0.249].
# Neither interval is below 0: it is not shown that the domains need their own neurons more than others.
#
# Selection by firing always finds neurons: that there are some is no finding. How specific they are, and what is lost without them,
# could have come out otherwise. docs/domain_neurons.md has the larger run, and a selection by effect.

# %%
lowest = neurons.to_dataframe().groupby("module")["dape_nats"].min()
right = ablations.accuracy().query("domain == 'all' and module == 'all'").set_index("selection")
pooled = excess.query("domain == 'all'").set_index("control")
print(
    f"The most specific neurons have an entropy of {', '.join(f'{nats:.3f} nats ({module})' for module, nats in lowest.items())}; a neuron that "
    f"fires alike in all {len(neurons.domains)} domains has {math.log(len(neurons.domains)):.3f}."
)
print(f"Image tokens alone select {both} of the {int(everywhere.sum())} decoder neurons again; by chance it would be {by_chance:.1f}.")
shares = {name: "{:.0f} % [{:.0f}, {:.0f}]".format(*100 * right.loc[name, ["accuracy", "low", "high"]]) for name in (NONE, FIRING, RANDOM)}
print(
    f"Of {int(right.loc[NONE, 'items'])} test questions {shares[NONE]} are answered rightly; with the domain's own neurons off "
    f"{shares[FIRING]}, with as many random ones of the same layers off {shares[RANDOM]}."
)
losses = ["{:z.3f} nats [{:z.3f}, {:z.3f}]".format(*pooled.loc[c].filter(like="excess_log_prob")) for c in (RANDOM, RANDOM_RATE)]
print(
    f"With the own neurons off rather than the random ones, the right answer's log-probability differs by {losses[0]}; rather than random "
    f"ones that fire as often, by {losses[1]}."
)
below = int((pooled["excess_log_prob_high"] < 0).sum())
print(
    "Both intervals are below 0: the domains need their own neurons more than others."
    if below == 2
    else f"{('Neither interval', 'Only one interval')[below]} is below 0: it is not shown that the domains need their own neurons more than others."
)
