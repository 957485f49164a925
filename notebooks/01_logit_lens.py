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
MODEL = "scenes"  # or "Qwen/Qwen2-VL-2B-Instruct"

# %matplotlib inline
import torch
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

# %%
image_lens = logit_lens(model, inputs, positions="image[0]")
image_lens.plot_image(item.image)

# %% [markdown]
# **What was learnt.** The table says at which layer the answer's rank becomes 0 and stays there.

# %%
lens.to_dataframe().query("rank == 1")[["layer_label", "token", "probability", "entropy_nats"]]
