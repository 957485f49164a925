# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Can the model's inside tell that its answer is made up?
#
# The contextual lens scores an answer by how close its contextual embedding comes to some image token's, and the same
# comparison gives a box. Here it stands beside its rivals, on questions whose every answer and every place is known.
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
from analyses.benchmarks import load_scenes

from analyses.contextual_lens import ground
from analyses.experiments.hallucination import detect_hallucinations
from hooked_qwen2vl import HookedQwen2VL

torch.set_grad_enabled(False)
model = HookedQwen2VL.from_pretrained(MODEL)
items = [item for item in load_scenes(160) if item.category in ("relation", "comparison")]
print(len(items), "questions, such as", items[0].question, "→", items[0].answer)

# %% [markdown]
# The model answers, and every method scores every answer; higher means more likely right. The command
# `hooked-qwen2vl hallucination` does the same in a folder, and a long run can be stopped and gone on with.

# %%
result = detect_hallucinations(model, items, "scenes: relation and comparison", n_boot=200, progress=False)
result.claims[["category", "question", "gold", "answer", "correct", "probability", "contextual"]].head(8)

# %% [markdown]
# The first line counts the mistakes: with few of them the intervals are wide. "within categories" compares right and
# hallucinated answers of one category only; pooled, a score can win by knowing which category is hard.

# %%
result.table().T

# %%
result.plot_intervals()

# %%
result.plot_scores()

# %% [markdown]
# **The control decides.** `contextual_control` is the contextual lens with another picture. A difference between the two
# lines is what the picture adds; if their intervals overlap, these items do not show that it adds anything.

# %%
result.to_dataframe().query("method in ('contextual', 'contextual_control', 'probability')")[
    ["method", "category", "items", "hallucinated", "auroc", "auroc_low", "auroc_high"]
]

# %% [markdown]
# ## Where is the answer?
#
# The heat map is the cosine of the answer with each image token, at its best layer; the box is the rectangle whose mean
# vector is closest. Dashed: where the thing asked for truly is.

# %%
item = next(item for item in load_scenes(40) if item.category == "attribute" and item.domain == "shapes")
inputs = model.encode(model.to_inputs(item.question, images=list(item.images), answers=item.answer))
grounding = ground(model, inputs)
print(item.question, "→", item.answer, "; box", grounding.boxes[0].tolist(), "; true", item.item.depends_on[0].box)
grounding.plot(images=list(item.images), truth=[item.item.depends_on[0].box])

# %% [markdown]
# **What was learnt.** Read the table with its counts. docs/hallucination.md has the larger run.
