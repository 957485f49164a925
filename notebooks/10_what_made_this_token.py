# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # What in the image made this token?
#
# For each token of an answer, every image token is hidden in turn: what the token's log-probability loses is its exact effect.
# Beside it the usual baselines, and curves that judge them all. The model is the embedded one, a small Qwen2-VL trained on
# generated scenes; one constant switches to a published model.

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
import json

import pandas as pd
from IPython.display import display

from analyses.cli.shared import SAMPLES
from analyses.saliency import METHODS, curves, saliency
from analyses.sinks import find_sinks
from analyses.views.saliency import curves_plot
from hooked_qwen2vl import HookedQwen2VL, open_image

torch.set_grad_enabled(False)
model = HookedQwen2VL.from_pretrained(MODEL, dtype="float32", device=DEVICE)
sample = json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))[0]
image = open_image(SAMPLES / sample["image"])
inputs = model.encode(model.to_inputs(sample["question"], images=[image]))
inputs = model.generate(inputs, max_new_tokens=8, do_sample=False, return_type="inputs", verbose=False)
print(sample["question"], "→", model.to_string(inputs.tokens[0, inputs.positions("answer")]))

# %% [markdown]
# The exact map: red, without this image token the answer's token would be less likely.

# %%
maps = {method: saliency(model, inputs, method, progress=False) for method in METHODS}
display(maps["knockout"].plot(images=[image]))

# %% [markdown]
# The other methods, and random numbers. Every panel has its own range, written above it.

# %%
for method in METHODS[1:]:
    display(maps[method].plot(images=[image]))

# %% [markdown]
# Which is right? Hide the image tokens in the order of each map (deletion: the sooner the answer falls the better), or show them in it
# (insertion). By keys, which is what the knockout measures, and by pixels. The table has the areas under the curves; nine more random
# orders say how much of them is luck.

# %%
orders = {f"random {seed}": saliency(model, inputs, "random", seed=seed) for seed in range(1, 10)}
areas = {}
for by in ("keys", "pixels"):
    judged = {name: curves(model, inputs, found, by) for name, found in maps.items()}
    display(curves_plot(list(judged.values())))
    others = [curves(model, inputs, found, by) for found in orders.values()]
    rows = [(name, *one.areas) for name, one in zip((*maps, *orders), (*judged.values(), *others))]
    areas[by] = pd.DataFrame(rows, columns=["method", "deletion", "insertion"]).set_index("method")
pd.concat({f"by {by}": table.loc[list(maps)] for by, table in areas.items()}, axis=1).round(2)

# %% [markdown]
# Attention can also lie on tokens that say nothing: sinks, which receive at least five times an even share. They can be left out of maps
# (last picture; without sinks it is the map of attention again).
# The five positions that receive most:

# %%
sinks = find_sinks(model, inputs)
received = sinks.to_dataframe(only_sinks=False).head(5)
display(received[["position", "token", "segment", "sink", "received", "norm_over_median"]].round(2))
display(sinks.plot(images=[image]))
sinks.exclude(maps["attention"]).plot(images=[image])

# %% [markdown]
# **What was learnt.** On the embedded model:
#
# Of single image tokens, one on the object asked about counts most: hidden, it costs 'purple' 2.79 nats.
# Without the 4 image tokens that the knockout ranks first, all at once, by pixels, the answer's probability goes from 1.00 to 0.00.
# Area under the deletion curve by pixels, small is better: knockout 0.06, occlusion 0.06, integrated gradients 0.06, attention × gradient 0.06, rollout 0.14, attention 0.06; 10 random orders 0.07 to 0.94.
# Area under the insertion curve by pixels, large is better: knockout 0.94, occlusion 0.94, integrated gradients 0.94, attention × gradient 0.94, rollout 0.94, attention 0.94; 10 random orders 0.06 to 0.94.
# 5 of 6 methods beat every random order in both; the others: rollout.
# 0 of 65 positions receive at least 5 times an even share of attention; the most is 2.4 times, by a token of image[0].
#
# One picture judges no method: `analyses.experiments.saliency` asks many, with intervals, and docs/saliency.md says what came out.

# %%
exact = maps["knockout"].to_dataframe().query("answer_token == 0").sort_values("value", ascending=False)
x, y = (exact[["x0", "y0"]].to_numpy() + exact[["x1", "y1"]].to_numpy()).T / 2
exact["inside"] = [any(a <= u <= c and b <= v <= d for a, b, c, d in sample["depends_on"]) for u, v in zip(x, y)]
print(
    f"Of single image tokens, one {'on' if exact['inside'].iloc[0] else 'off'} the object asked about counts most: hidden, it costs "
    f"{exact['token'].iloc[0]!r} {exact['value'].iloc[0]:.2f} nats."
)
deleted = judged["knockout"]
print(
    f"Without the {round(float(deleted.shares[1]) * len(exact))} image tokens that the knockout ranks first, all at once, by pixels, the answer's probability goes "
    f"from {float(deleted.deletion[0]):.2f} to {float(deleted.deletion[1]):.2f}."
)
pixels, others = areas["pixels"].loc[list(maps)].drop("random"), areas["pixels"].loc[["random", *orders]]
for curve, better in (("deletion", "small"), ("insertion", "large")):
    print(
        f"Area under the {curve} curve by pixels, {better} is better: {', '.join(f'{method} {area:.2f}' for method, area in pixels[curve].items())}; "
        f"{len(others)} random orders {others[curve].min():.2f} to {others[curve].max():.2f}."
    )
beaten = (pixels["deletion"] < others["deletion"].min()) & (pixels["insertion"] > others["insertion"].max())
print(
    f"{int(beaten.sum())} of {len(beaten)} methods beat every random order in both; the others: {', '.join(beaten.index[~beaten]) or 'none'}."
)
print(
    f"{int(sinks.is_sink.sum())} of {len(sinks.is_sink)} positions receive at least {sinks.threshold:.0f} times an even share of attention; the most is "
    f"{received['received'][0]:.1f} times, by a token of {received['segment'][0]}."
)
