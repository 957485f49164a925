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
# decoder run by TransformerLens. Depth is relative, so any other TransformerLens model can stand in the same figure.

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
OTHERS = {}  # name -> folder or hub id of a text model, such as {"gpt2": "gpt2"}
ITEMS = 4

# %matplotlib inline
import tempfile

from transformer_lens.model_bridge import TransformerBridge

from analyses.data import examples
from analyses.experiments.compare import compare_models, text_agreement
from analyses.model_patching import patch_between_models
from analyses.views.circuits import Page, strip
from hooked_qwen2vl import HookedQwen2VL

torch.set_grad_enabled(False)
model = HookedQwen2VL.from_pretrained(MODEL)
folder = model.export_text_model(tempfile.mkdtemp() + "/text")
models = {MODEL: model, "twin": TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)}
models |= {name: TransformerBridge.boot_transformers(place, device="cpu") for name, place in OTHERS.items()}
questions = list(examples("scenes", ITEMS))

# %% [markdown]
# On text alone the twin *is* the decoder, layer by layer: if this fails, nothing below means anything.

# %%
agreement = text_agreement(model, models["twin"], [example.question for example in questions])
assert agreement["ok"].all()
agreement.groupby("layer_label", sort=False)["share"].max()

# %%
comparison = compare_models(models, questions, progress=False)
comparison.plot()

# %%
table = comparison.to_dataframe().set_index(["model", "condition"])
table[["items", "right", "answer_prob", "first_depth", "settled_depth"]].round(2)

# %% [markdown]
# Are the heads that look at the previous word, or at a word's earlier copy, the ones that do so among image tokens?
# Dashed: a head that spreads its attention evenly.

# %%
heads = comparison.heads[MODEL]
heads.plot()

# %%
heads.sharing()[["kind", "rank_correlation", "best_text", "best_image", "best_heads", "best_on_both", "by_chance"]].round(2)

# %% [markdown]
# One of them, drawn by circuitsvis: the image's tokens are pooled into what the question asks about and the rest.

# %%
example = next(example for example in questions if example.images and example.item is not None and example.item.depends_on)
inputs = model.to_inputs(example.question, images=list(example.images))
asked = {"what is asked about": sorted({int(p) for thing in example.item.depends_on for p in inputs.positions(thing.box)})}
_, cache = model.run_with_cache(inputs)
page = Page(f"{example.question} Attention of every head in the middle block")
page.pictures(example.images)
page.attention_heads(
    cache["pattern", model.cfg.n_layers // 2][0],
    strip(model.to_str_tokens(inputs), inputs.segments[0], asked, only=["image[0]", "question"]),
)
page

# %% [markdown]
# Base against fine-tuned, both Qwen2-VL: where does fine-tuning change what is computed? Here a stand-in, one block's MLP
# scaled by a tenth; with real models, `HookedQwen2VL.from_hf(peft_model.merge_and_unload(), processor)`.

# %%
tuned = HookedQwen2VL.from_pretrained(MODEL)
tuned.blocks[model.cfg.n_layers // 2].mlp.down_proj.weight.mul_(1.1)
prompts = [model.to_inputs(example.question, images=list(example.images)) for example in questions]
patched = patch_between_models(model, tuned, prompts, progress=False)
patched.plot()

# %% [markdown]
# **What was learnt.** On the embedded model:
#
# On text the twin's layers differ from the decoder's by at most 2e-06 of the logits' spread.
# With the picture 50 % of 4 questions are answered rightly, settled after 0.50 of the depth.
# With the picture described in words 25 % of 4 questions are answered rightly, settled after 0.38 of the depth.
# With neither 25 % of 4 questions are answered rightly, settled after 0.19 of the depth.
#
# Compare depths between picture and words only where the model answers both rightly. Few questions here: an example, not a rate.

# %%
shown = comparison.to_dataframe().query("model == @MODEL").set_index("condition")
share = agreement["share"].max()
print(
    f"On text the twin's layers differ from the decoder's by at most {share:.0e} of the logits' spread."
    if share
    else "On text the twin's layers are the decoder's."
)
for condition, words in (("image", "With the picture"), ("words", "With the picture described in words"), ("neither", "With neither")):
    row = shown.loc[condition]
    print(
        f"{words} {100 * row['right']:.0f} % of {row['items']:.0f} questions are answered rightly, settled after {row['settled_depth']:.2f} of the depth."
    )
