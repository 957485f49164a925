# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Does an image take the same way through the layers as words?
#
# The same questions with the picture, with the picture described in words, and with neither; the model beside its own text
# decoder run by TransformerLens. Depth is relative, so any other TransformerLens model can stand in the same figure. The model
# is the embedded one, a small Qwen2-VL trained on generated scenes; one constant switches to a published model.

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
OTHERS = {}  # name -> folder or hub id of a text model, such as {"gpt2": "gpt2"}
ITEMS = 12

# %matplotlib inline
import math
import tempfile

from transformer_lens.model_bridge import TransformerBridge

from analyses.data import examples
from analyses.experiments.compare import compare_models, text_agreement
from analyses.views.circuits import Page, strip
from hooked_qwen2vl import HookedQwen2VL

torch.set_grad_enabled(False)
model = HookedQwen2VL.from_pretrained(MODEL, dtype="float32", device=DEVICE)
folder = model.export_text_model(tempfile.mkdtemp() + "/text")
models = {MODEL: model, "twin": TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)}
models |= {name: TransformerBridge.boot_transformers(place, device="cpu") for name, place in OTHERS.items()}
questions = list(examples("scenes", ITEMS))

# %% [markdown]
# On text alone the twin *is* the decoder, layer by layer: if this fails, nothing below means anything.

# %%
agreement = text_agreement(model, models["twin"], [example.question for example in questions])
assert agreement["ok"].all()
agreement.groupby("layer_label", sort=False)["share"].max().to_frame("largest difference / logits' spread").map("{:.0e}".format)

# %%
comparison = compare_models(models, questions, progress=False)
comparison.plot()

# %%
table = comparison.to_dataframe().set_index(["model", "condition"])
table[["items", "right", "answer_prob", "first_depth", "settled_depth"]].round(2)

# %% [markdown]
# Are the heads that look at the previous token, or at a token's earlier copy, the ones that do so among image tokens?
# Dashed: a head that spreads its attention evenly. The table: the correlation of the two scores over heads, the best scores, how many
# heads count as best, and how many are best on both, also by chance.

# %%
heads = comparison.heads[MODEL]
heads.plot()

# %%
sharing = heads.sharing()
sharing[["kind", "rank_correlation", "best_text", "best_image", "best_heads", "best_on_both", "by_chance"]].round(2)

# %% [markdown]
# The heads of the middle block, drawn by circuitsvis: the image's tokens are pooled into what the question asks about and the rest.

# %%
example = next(example for example in questions if example.images and example.item is not None and example.item.depends_on)
inputs = model.to_inputs(example.question, images=list(example.images))
asked = {"asked about": sorted({int(p) for thing in example.item.depends_on for p in inputs.positions(thing.box)})}
_, cache = model.run_with_cache(inputs)
page = Page(f"{example.question} Attention of every head in the middle block")
page.pictures(example.images)
page.attention_heads(
    cache["pattern", model.cfg.n_layers // 2][0],
    strip(model.to_str_tokens(inputs), inputs.segments[0], asked, only=["image[0]", "question"]),
)
page

# %% [markdown]
# **What was learnt.** On the embedded model:
#
# On text the twin's layers differ from the decoder's by less than 0.001 % of the logits' spread.
# With the picture 10 of 12 questions are answered rightly.
# With the picture described in words 2 of 12 questions are answered rightly.
# With neither 2 of 12 questions are answered rightly.
# Answered rightly both with the picture and with its description: 1, settled after 0.88 of the depth with the picture, 0.88 with the words.
# How many of the 3 heads that are best on text are also best among image tokens: previous token 1, duplicate token 0, induction 0; by chance 0.3.
#
# Compare depths between picture and words only where the model answers both rightly: the embedded model was trained on pictures, not on
# descriptions. Few questions here: an example, not a rate. For a base beside a tuned model see notebook 08.

# %%
share = float(agreement["share"].max())
print(
    f"On text the twin's layers differ from the decoder's by less than {100 * 10.0 ** math.ceil(math.log10(max(share, 1e-9))):g} % of the logits' spread."
)
runs = {run.condition: run.trajectories.to_dataframe() for run in comparison.runs if run.model == MODEL}
for condition, words in (("image", "With the picture"), ("words", "With the picture described in words"), ("neither", "With neither")):
    print(f"{words} {int(runs[condition]['right'].sum())} of {len(runs[condition])} questions are answered rightly.")
both = runs["image"]["right"].astype(bool) & runs["words"]["right"].astype(bool)
seen, read = (runs[condition].loc[both, "stability_depth"].median() for condition in ("image", "words"))
print(
    f"Answered rightly both with the picture and with its description: {int(both.sum())}"
    + (
        f", settled after {seen:.2f} of the depth with the picture, {read:.2f} with the words."
        if both.any()
        else ", so their depths cannot be compared."
    )
)
shared = ", ".join(f"{row.kind} {row.best_on_both}" for row in sharing.itertuples())
print(
    f"How many of the {sharing['best_heads'].max()} heads that are best on text are also best among image tokens: {shared}; "
    f"by chance {sharing['by_chance'].mean():.1f}."
)
