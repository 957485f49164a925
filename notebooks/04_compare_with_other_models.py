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
MODEL = "scenes"  # or "Qwen/Qwen2-VL-2B-Instruct"
OTHERS = {}  # name -> folder or hub id of a text model, such as {"gpt2": "gpt2"}
ITEMS = 4

# %matplotlib inline
import tempfile

import torch
from analyses.compare import compare_models, text_agreement
from transformer_lens.model_bridge import TransformerBridge

from analyses.data import examples
from analyses.model_patching import patch_between_models
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
comparison = compare_models(models, questions)
comparison.plot()

# %%
comparison.to_dataframe().set_index(["model", "condition"]).T

# %% [markdown]
# Are the heads that look at the previous word, or at a word's earlier copy, the ones that do so among image tokens?
# Dashed: a head that spreads its attention evenly.

# %%
heads = comparison.heads[MODEL]
heads.plot()

# %%
heads.sharing()

# %% [markdown]
# Base against fine-tuned, both Qwen2-VL: where does fine-tuning change what is computed? Here a stand-in, one block's MLP
# scaled by a tenth; with real models, `HookedQwen2VL.from_hf(peft_model.merge_and_unload(), processor)`.

# %%
tuned = HookedQwen2VL.from_pretrained(MODEL)
tuned.blocks[model.cfg.n_layers // 2].mlp.down_proj.weight.mul_(1.1)
prompts = [model.to_inputs(example.question, images=list(example.images)) for example in questions]
patched = patch_between_models(model, tuned, prompts)
patched.plot()

# %% [markdown]
# **What was learnt.** `leaves_scene_depth` and `reaches_last_depth` say where the answer leaves the scene and where it
# arrives at the last position; compare them between picture and words only where the model answers both rightly (`right`).

# %%
table = comparison.to_dataframe()
table[["model", "condition", "items", "right", "pairs", "leaves_scene_depth", "reaches_last_depth"]]
