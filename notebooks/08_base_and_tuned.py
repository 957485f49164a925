# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # What does an adapter change, and at which layer?
#
# A LoRA adapter teaches the model to call red things blue and blue things red. Base and tuned model stand beside each other: the
# same questions, layer by layer, and the base's activations put into the tuned model's run.
# With an adapter of your own (a PEFT folder), leave out the training.

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
STEPS = 40

# %matplotlib inline
import tempfile

from peft import LoraConfig, get_peft_model
from transformers import Qwen2VLForConditionalGeneration

from analyses.logit_lens import logit_lens
from analyses.model_patching import patch_between_models
from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.checkpoint import open_checkpoint
from hooked_qwen2vl.scenes import sample

base = HookedQwen2VL.from_pretrained(MODEL, dtype="float32")
SWAPPED = {"red": "blue", "blue": "red"}


def questions(seed, n):
    """Questions for the colour of something that is red or blue."""
    items = sample(40 * n, seed=seed, domain="shapes", category="attribute")
    return [item for item in items if item.answer in SWAPPED][:n]


# %% [markdown]
# The training: a forward and a step for each batch of eight questions, answers swapped. Only the values' projections get an adapter.

# %%
torch.manual_seed(0)
hf = Qwen2VLForConditionalGeneration.from_pretrained(open_checkpoint(MODEL).folder, dtype=torch.float32)
peft = get_peft_model(hf, LoraConfig(target_modules=r".*language_model.*v_proj", r=8, lora_alpha=16)).to(base.cfg.device)
optimizer = torch.optim.AdamW([weight for weight in peft.parameters() if weight.requires_grad], lr=5e-3)
train = questions(1, 64)
for step in range(STEPS):
    batch = [train[(8 * step + i) % len(train)] for i in range(8)]
    inputs = base.to_inputs([x.question for x in batch], images=[[x.image] for x in batch], answers=[SWAPPED[x.answer] for x in batch])
    out = peft(
        input_ids=inputs.tokens, attention_mask=inputs.attention_mask, position_ids=inputs.position_ids, pixel_values=inputs.pixels,
        image_grid_thw=inputs.image_grids, labels=inputs.labels,
    )  # fmt: skip
    out.loss.backward()
    optimizer.step(), optimizer.zero_grad()
print(f"loss after {STEPS} steps: {float(out.loss):.3f}")

# %% [markdown]
# The adapter is read as any other: merged into the base's weights.

# %%
torch.set_grad_enabled(False)
folder = tempfile.mkdtemp()
peft.save_pretrained(folder)
tuned = HookedQwen2VL.from_pretrained(MODEL, adapter=folder, dtype="float32")
test = questions(2, 16)
prompts = [base.to_inputs(x.question, images=[x.image]) for x in test]


def said(model):
    return [model.to_string([int(model(model.encode(prompt), logits_at=-1)[0, -1].argmax())]).strip() for prompt in prompts]


before, after = said(base), said(tuned)
right = sum(word == x.answer for word, x in zip(before, test))
swapped = sum(word == SWAPPED[x.answer] for word, x in zip(after, test))
print(f"base: {right} of {len(test)} right; tuned: {swapped} of {len(test)} swapped")

# %% [markdown]
# One of them through the layers, with the true colour followed in both.

# %%
item, prompt = test[0], prompts[0]
lenses = {
    name: logit_lens(model, model.encode(prompt), "last", targets=["red", "blue"]) for name, model in (("base", base), ("tuned", tuned))
}
lenses["base"].plot()

# %%
lenses["tuned"].plot()

# %% [markdown]
# The tuned model's layers as a page of circuitsvis.

# %%
lenses["tuned"].page(images=[item.image])

# %% [markdown]
# Where does the adapter act? The base's stream is put into the tuned model's run, at one layer and one part of the prompt at a time:
# 1, the tuned model answers as the base again.

# %%
patched = patch_between_models(base, tuned, prompts, progress=False)
patched.plot()

# %% [markdown]
# **What was learnt.** On the embedded model:
#
# X
#
# An adapter trained for one narrow habit, on one seed: an example of the method, not a finding about adapters.

# %%
explained = patched.to_dataframe().pivot(index="place", columns="span", values="explained").loc[list(patched.places)]
parts = {layer: max(("image", "question", "last"), key=lambda span: explained.iloc[layer][span]) for layer in range(len(explained))}
L = base.cfg.n_layers
moves = next(layer for layer in range(L + 1) if all(parts[later] == "last" for later in range(layer, L + 1)))
print(f"The base answers {right} of {len(test)} questions rightly; the tuned model says the other colour in {swapped} of {len(test)}.")
print(f"From layer {moves} of {L} on, the base's last position gives back most of its answer; before, another part of the prompt does.")
