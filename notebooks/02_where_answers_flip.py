# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Where does the answer flip, and what makes it flip?
#
# Layer by layer the lens names an answer. Often it names another one first. Here flips are found, attributed exactly to the
# heads and the MLP of the block that made them, and tested: are the parts with the highest attribution the cause? The model is
# the embedded one, a small Qwen2-VL trained on generated scenes; one constant switches to a published model.

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
ITEMS = 18

# %matplotlib inline
from IPython.display import display

from analyses.data import examples
from analyses.experiments.flips import flip_study
from analyses.flip_patching import attribute_flip, component_effects
from analyses.logit_lens import logit_lens
from analyses.trajectory import answer_trajectory
from hooked_qwen2vl import HookedQwen2VL

torch.set_grad_enabled(False)
model = HookedQwen2VL.from_pretrained(MODEL, dtype="float32", device=DEVICE)

# %% [markdown]
# One question whose answer needs two steps, the one with most flips among a few. Upper strip: the token on top at each layer.
# Solid lines: the probability of the right answer and of its rival. Dotted: layers where the top token changes; those between two
# possible answers are the flips below.


# %%
def follow(example):
    """The prompt, and the answer's way through its layers."""
    inputs = model.encode(model.to_inputs(example.question, images=list(example.images)))
    return inputs, answer_trajectory(model, inputs, example.answer, example.candidates, question=example.question)


hops = [example for example in examples("scenes", 36) if example.category == "relation"]
example, (inputs, item) = max(((e, follow(e)) for e in hops), key=lambda found: len(found[1][1].eligible_flips))
display(example.images[0])
print(example.question, "→", example.answer, "; the model says", item.top1_tokens[-1])
item.plot()

# %% [markdown]
# Which parts of the block made each flip? The attribution is in logits of (new − old). With the change of the final norm's scale and
# the attention's bias, which are no parts and stand above the table, it sums to the change exactly. `ablated` is causal: how the
# *output's* logit difference changes when the part is set to 0.

# %%
for layer in item.eligible_flips:
    flip = attribute_flip(model, inputs, layer, int(item.top1[layer]), int(item.top1[layer - 1]))
    assert abs(flip.total - (flip.after - flip.before)) < 1e-3
    print(
        f"layer {layer}, made by block {flip.block}: {flip.lost!r} → {flip.gained!r}, {flip.before:+.2f} → {flip.after:+.2f}; "
        f"of it {flip.norm:+.2f} by the norm's scale, {flip.bias:+.2f} by the bias"
    )
    display(component_effects(model, inputs, flip).style.format(precision=2).hide())

# %% [markdown]
# The same answers, drawn by circuitsvis: the five top tokens at every layer; the last column follows what the model says.

# %%
logit_lens(model, inputs, positions="last", top_k=5).page(images=example.images)

# %% [markdown]
# One flip is an anecdote. Over a data set: when are answers there, and which are found and lost again? If the model is right: straight
# (the answer stays on top from the first layer where it is) or wavered. If it is wrong: held then lost (the answer was on top at some
# layer), or settled, in the first or the second half of the layers, without it.

# %%
study = flip_study(model, examples("scenes", ITEMS), n_random=5, progress=False)
study.plot_trajectories()

# %% [markdown]
# Every flip between two possible answers is tested: the two parts with the highest attribution are set to 0, beside as
# many random parts. *Removed* at its own layer is close to what the attribution says; *reversed at the output* is the
# causal test.

# %%
study.plot()

# %%
study.summary().round(2)

# %% [markdown]
# The last layer: from the last layer but one to the output, as it is, and as a notebook would see it that norms the last
# hidden state twice. What "normed twice" shows beyond "as it is" is an artefact. Total variation (0 to 1), Jensen-Shannon divergence
# (nats), share of prompts whose top token changes.

# %%
shift = study.last_shift().loc[["tv", "js", "argmax_changed"]]
shift.index = ["total variation", "Jensen-Shannon", "top token changes"]
shift.round(4)

# %% [markdown]
# **What was learnt.** On the embedded model:
#
# 6 flips between possible answers in 18 questions, of which 15 are answered rightly.
# Setting the two parts with the highest attribution to 0 removed 100 % of the flips [57, 100], random parts 33 % [8, 51]: more than chance.
# Setting the two parts with the highest attribution to 0 reversed 33 % of the flips [0, 67], random parts 13 % [0, 25]: not shown to be more than chance.
# The last block changes the reading by a total variation of 0.113 on average; normed twice, it would seem to be 0.114.
#
# Attribution finds the parts that make a flip where it happens; whether the flip decides the output is another question: later blocks can
# write the same answer again. Few questions here, so wide intervals; docs/flips.md has the larger run.

# %%
shares = study.summary().set_index(["flip is", "by ablating"])
found, random = "found components", "random components"
right = int(study.prompts["right"].sum())
print(f"{len(study.flips)} flips between possible answers in {len(study.prompts)} questions, of which {right} are answered rightly.")
for what in ("removed", "reversed"):
    ours, theirs = (100 * shares.loc[(what, parts), ["share", "low", "high"]] for parts in (found, random))
    print(
        f"Setting the two parts with the highest attribution to 0 {what} {'{:.0f} % of the flips [{:.0f}, {:.0f}]'.format(*ours)}, "
        f"random parts {'{:.0f} % [{:.0f}, {:.0f}]'.format(*theirs)}: "
        f"{'more than chance.' if ours['low'] > theirs['high'] else 'not shown to be more than chance.'}"
    )
once, twice = shift.loc["total variation", ["mean, as it is", "mean, normed twice"]]
print(f"The last block changes the reading by a total variation of {once:.3f} on average; normed twice, it would seem to be {twice:.3f}.")
