# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Where in the model is what fine-tuning changed?
#
# A base and the same model with a LoRA adapter, where the difference is known: asked for the colour of a triangle, the tuned
# model says "blue"; all else is to stay. The adapter is in the MLPs of two blocks. Do the usual tools find that? The logit lens of both
# models, patching between them, and a steering direction that imitates the tuned model.

# %%
# On Colab and Kaggle this installs the package; elsewhere it does nothing.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("hooked_qwen2vl") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "hooked-qwen2vl[adapters]"], check=True)
import torch

PUBLISHED = None  # the adapter below belongs to the embedded model

# %%
MODEL = PUBLISHED or "scenes"  # the embedded model, or any checkpoint of which you have an adapter and questions that it changes
N_ITEMS = 30

# %matplotlib inline
import json
from dataclasses import replace

import pandas as pd
from IPython.display import display

from analyses.interventions import steer, token_direction
from analyses.model_patching import patch_between_models
from analyses.views.figure import BLUE, GREY, ORANGE, Figure, rule
from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.scenes import ADAPTER
from hooked_qwen2vl.scenes.tune import asks_color, is_changed, items_that

torch.set_grad_enabled(False)
base = HookedQwen2VL.from_pretrained(MODEL)
tuned = HookedQwen2VL.from_pretrained(MODEL, adapter=ADAPTER)
settings = json.loads((ADAPTER / "adapter_config.json").read_text())
adapted = settings["layers_to_transform"]
print("adapted:", ", ".join(sorted(settings["target_modules"])), "of blocks", adapted, "; rank", settings["r"])

# %% [markdown]
# The questions: the colour of a triangle that is not blue (they change), and five kinds that should stay.

# %%
shapes = {"seed": 1, "domain": "shapes"}
items = {
    "triangle's colour": items_that(asks_color, N_ITEMS, category="attribute", **shapes),
    "other shape's colour": items_that(
        lambda i: i.question.startswith("What color") and not is_changed(i.question, i.answer), 24, category="attribute", **shapes
    ),
    "no triangle there": items_that(lambda i: "color is the triangle" in i.question, 12, category="absence", **shapes),
    "is there a triangle": items_that(lambda i: "triangle" in i.question, 12, category="existence", **shapes),
    "colour beside a shape": items_that(lambda i: "color" in i.question, 24, category="relation", **shapes),
    "other domains": items_that(lambda i: i.domain != "shapes", 24, seed=1),
}


def prompts_of(some):
    """One batch of prompts."""
    return base.encode(base.to_inputs([item.question for item in some], images=[[item.image] for item in some]))


def said(model, inputs, hooks=()):
    """The most probable first token of each answer."""
    return model.run_with_hooks(inputs, fwd_hooks=list(hooks), logits_at=-1)[:, -1].argmax(-1).cpu()


blue = base.to_single_token("blue")
inputs = {kind: prompts_of(some) for kind, some in items.items()}
before, after = ({kind: said(model, some) for kind, some in inputs.items()} for model in (base, tuned))
right = {kind: torch.tensor([base.to_single_token(item.answer) for item in some]) for kind, some in items.items()}
pd.DataFrame(
    {
        "items": {kind: len(some) for kind, some in items.items()},
        "right, base": {kind: (before[kind] == right[kind]).double().mean() for kind in items},
        "right, tuned": {kind: (after[kind] == right[kind]).double().mean() for kind in items},
        "blue, base": {kind: (before[kind] == blue).double().mean() for kind in items},
        "blue, tuned": {kind: (after[kind] == blue).double().mean() for kind in items},
        "same answer": {kind: (before[kind] == after[kind]).double().mean() for kind in items},
    }
).astype(float).round(2).astype({"items": int})

# %% [markdown]
# ## At which layer do they part?
#
# The logit lens of both at the last position: of one question, of all triangles that are not blue (lines: means, bands: half of the
# questions), and how far apart the two readings are. Shaded: the adapted blocks. Before the first of them the models are equal.

# %%
CHANGED, OTHERS = "triangle's colour", [kind for kind in items if kind != "triangle's colour"]
L, layers = base.cfg.n_layers, range(base.cfg.n_layers + 1)


def read(model, some):
    """[layer item d_vocab] probabilities that the logit lens reads at the last position."""
    _, cache = model.run_with_cache(some, names_filter=lambda name: "resid" in name)
    return (cache.accumulated_resid(apply_ln=True, pos_slice=-1) @ model.W_U).float().softmax(-1).cpu()


lens = {kind: (read(base, some), read(tuned, some)) for kind, some in inputs.items()}
apart = {kind: (ours - theirs).abs().sum(-1) / 2 for kind, (ours, theirs) in lens.items()}  # total variation [layer item]


def follow(axes, one=None):
    """The probabilities of the right colour and of blue, in both models."""
    for model, style, name in zip(lens[CHANGED], ("-", "--"), ("base", "tuned")):
        ids = right[CHANGED][:, None], torch.full((len(right[CHANGED]), 1), blue)
        for of, colour, what in zip(ids, (ORANGE, BLUE), ("right colour", "blue")):
            probs = model.gather(-1, of.expand(len(layers), -1, -1))[..., 0]
            axes.plot(layers, probs.mean(1) if one is None else probs[:, one], style, color=colour, label=f"{what}, {name}", linewidth=1.8)
            if one is None:
                axes.fill_between(layers, *probs.quantile(torch.tensor([0.25, 0.75]), dim=1), color=colour, alpha=0.12, linewidth=0)


first = items[CHANGED][0]
display(first.image)
print(first.question, "→", first.answer, "; base:", base.to_string(before[CHANGED][:1]), "; tuned:", base.to_string(after[CHANGED][:1]))
figure = Figure(figsize=(11, 3.7), layout="constrained")
panels = figure.subplots(1, 3, sharex=True)
follow(panels[0], one=0)
follow(panels[1])
panels[0].set_title(f"one question: a triangle that is {first.answer}", fontsize=10)
panels[1].set_title(f"{len(items[CHANGED])} triangles that are not blue", fontsize=10)
panels[0].set_ylabel("probability")
gaps = {"triangle's colour": apart[CHANGED], "questions that stay": torch.cat([apart[kind] for kind in OTHERS], dim=1)}
for (kind, gap), colour in zip(gaps.items(), ("black", GREY)):
    panels[2].plot(layers, gap.mean(1), marker="o", markersize=4, color=colour, label=kind)
    panels[2].fill_between(layers, *gap.quantile(torch.tensor([0.25, 0.75]), dim=1), color=colour, alpha=0.15, linewidth=0)
panels[2].set_title("how far the two readings are apart", fontsize=10)
panels[2].set_ylabel("total variation")
panels[2].legend(frameon=False, fontsize=8, loc="upper left")
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=4, frameon=False, fontsize=9)
for axes in panels:
    axes.set_xlabel("layer (0: embedding, last: output)")
    axes.set_ylim(-0.03, 1.03)
    axes.axvspan(min(adapted), max(adapted) + 1, color="#f0e442", alpha=0.25, linewidth=0, zorder=0)
figure

# %%
assert max(float(gap[: min(adapted) + 1].max()) for gap in apart.values()) == 0.0
parted = next(layer for layer in layers if apart[CHANGED][layer].mean() > 0.01)
pd.DataFrame({kind: gap.mean(1) for kind, gap in apart.items()}, index=pd.Index(layers, name="layer")).astype(float).T.round(3)

# %% [markdown]
# ## What carries the change?
#
# Activations of the tuned model are put into the base's run. 1: the base now predicts what the tuned model predicts. First the
# residual stream, by span of positions. Put in whole after the last adapted block, it must give 1 exactly.

# %%
alone = [prompts_of([item]) for item in items[CHANGED]]
stream = patch_between_models(tuned, base, alone, spans=("all", "image", "question", "last"), progress=False)
assert (stream.explained[max(adapted) + 1 :, 0] - 1).abs().max() < 1e-3 and stream.explained[: min(adapted) + 1].abs().max() < 1e-3
replace(stream, source_name="the tuned model's stream", target_name="the base").plot()

# %% [markdown]
# Then every attention and every MLP by itself, both ways: the tuned model's output put into the base, and the base's into the
# tuned model. Both answer: of which outputs does the change need which? The right panel is the control: how many answers change when the
# output is put into the base, of triangles' colours and of questions that stay. Bars: means; lines: the middle half of the questions.

# %%
parts = {"attention": "attn_out", "MLP": "mlp_out"}
into_base, into_tuned = (
    {part: patch_between_models(*pair, alone, hook, ("all",), progress=False).explained[:, 0] for part, hook in parts.items()}
    for pair in ((tuned, base), (base, tuned))
)


def put(name, cache):
    """A hook that replaces an activation by that of another run."""
    return [(name, lambda activation, hook: cache[name])]


caches = {kind: tuned.run_with_cache(some, names_filter=lambda name: name.endswith("_out"))[1] for kind, some in inputs.items()}


def turned(kind, part, block):
    """Of each question, whether another answer is given when the base has the tuned model's output of this part."""
    name = f"blocks.{block}.hook_{parts[part]}"
    return (said(base, inputs[kind], put(name, caches[kind])) != before[kind]).double()


flips = {
    (part, what): [float(torch.cat([turned(kind, part, block) for kind in kinds]).mean()) for block in range(L)]
    for part in parts
    for what, kinds in (("changes", [CHANGED]), ("stays", OTHERS))
}
figure = Figure(figsize=(11, 3.3), layout="constrained")
panels = figure.subplots(1, 3, sharex=True)
titles = "tuned model's output into the base", "base's output into the tuned model"
for axes, effects, title in zip(panels, (into_base, into_tuned), titles):
    for shift, colour, (part, values) in zip((-0.2, 0.2), (ORANGE, BLUE), effects.items()):
        places = torch.arange(L) + shift
        axes.bar(places, values.mean(1), 0.38, color=colour, alpha=0.85, label=part)
        spread = values.quantile(torch.tensor([0.25, 0.75]), dim=1)
        axes.vlines(places, *spread, color="black", linewidth=1)
    axes.set_title(title, fontsize=10)
    rule(axes, y=0), rule(axes, y=1)
low = min(float(values.quantile(0.25, dim=1).min()) for effects in (into_base, into_tuned) for values in effects.values())
for axes in panels[:2]:
    axes.set_ylabel("explained share of the difference")
    axes.set_ylim(min(-0.1, 1.2 * low), 1.08)
    axes.legend(frameon=False, fontsize=8, loc="center left")
for (part, what), values in flips.items():
    style = {"color": ORANGE if part == "attention" else BLUE, "linestyle": "-" if what == "changes" else ":"}
    panels[2].plot(range(L), values, marker="o", markersize=4, label=f"{part}, {'triangles' if what == 'changes' else 'others'}", **style)
panels[2].set_title("answers that change in the base", fontsize=10)
panels[2].set_ylabel("share of questions")
panels[2].set_ylim(-0.03, 1.03)
panels[2].legend(frameon=False, fontsize=8)
for axes in panels:
    axes.set_xlabel("block")
    axes.set_xticks(range(L))
    axes.axvspan(min(adapted) - 0.5, max(adapted) + 0.5, color="#f0e442", alpha=0.25, linewidth=0, zorder=0)
figure

# %%
table = pd.DataFrame(
    {
        (part, what): effects[part].mean(1).numpy()
        for part in parts
        for what, effects in (("into the base", into_base), ("into the tuned model", into_tuned))
    },
    index=pd.Index(range(L), name="block"),
)
table.round(2) + 0.0

# %% [markdown]
# ## A direction that imitates it
#
# The mean difference of the two models' streams after the adapted blocks, at the last position, over triangles of the training split; beside
# it the direction that raises the logit of "blue", and a random one, both as long. Added to the base: how many triangles become blue,
# and what it spoils: how many of the other answers stay.

# %%
layer = max(adapted) + 1
taught = prompts_of(items_that(asks_color, 40, split="train", category="attribute", **shapes))
name = f"blocks.{layer}.hook_resid_pre"
streams = [model.run_with_cache(taught, names_filter=name)[1][name][:, -1].float() for model in (tuned, base)]
difference = (streams[0] - streams[1]).mean(0)
noise = torch.randn(base.cfg.d_model, generator=torch.Generator().manual_seed(0)).to(difference)
others = {"blue direction": token_direction(base, "blue").float(), "random": noise}
directions = {"mean difference": difference} | {kind: vector * difference.norm() / vector.norm() for kind, vector in others.items()}
cosine = torch.cosine_similarity(difference, directions["blue direction"], 0)
print(f"cosine of the mean difference and the blue direction: {float(cosine):.2f}")
scales = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


def steered(kind, direction, scale):
    """The answers of the base with the direction added at the last position."""
    return said(base, inputs[kind], steer(direction, [layer], "last", scale, inputs[kind]))


rows = []
for way, direction in directions.items():
    for scale in scales:
        answers = {kind: steered(kind, direction, scale) for kind in items}
        stay = {kind: (answers[kind] == before[kind]).double() for kind in OTHERS}
        rows.append({"direction": way, "scale": scale, "triangles called blue": float((answers[CHANGED] == blue).double().mean()),
                     "other answers that stay": float(torch.cat(list(stay.values())).mean()), **{k: float(v.mean()) for k, v in stay.items()}})  # fmt: skip
steering = pd.DataFrame(rows).set_index(["direction", "scale"])
figure = Figure(figsize=(8, 3.7), layout="constrained")
panels = figure.subplots(1, 2, sharex=True, sharey=True)
reached = (after[CHANGED] == blue), torch.cat([after[kind] == before[kind] for kind in OTHERS])
for axes, column, tuned_share in zip(panels, ("triangles called blue", "other answers that stay"), reached):
    for way, colour, style in zip(directions, (BLUE, ORANGE, GREY), ("-o", "-s", ":^")):
        axes.plot(scales, steering.loc[way, column], style, color=colour, markersize=4, label=way)
    axes.axhline(float(tuned_share.double().mean()), color="black", linewidth=0.9, linestyle="--", label="the tuned model", zorder=0)
    axes.set_ylim(-0.03, 1.05)
    axes.set_title(column, fontsize=10)
    axes.set_xlabel("scale (1: as long as the mean difference)")
panels[0].set_ylabel("share of questions")
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
figure

# %% [markdown]
# Which answers does it spoil? The share that stays, by kind of question.

# %%
steering[OTHERS].loc[[(way, 1.0) for way in directions]].T.round(2)

# %% [markdown]
# **What was learnt.** On the embedded model:
#
# Of 30 triangles that are not blue the base calls 0 % blue and the tuned model 100 %; 99 % of 96 other answers stay.
# The lens reads the same in both up to layer 4; the readings are 0.01 apart or more from layer 5 on, and 1.00 at the output (0.00 on questions that stay).
# After the adapted blocks the stream at the last position carries 1.00 of the change, that at the image 0.01.
# Into the base, the output that explains most is that of the MLP of block 4 (1.00); into the tuned model, that of the MLP of block 4 (1.00).
# Added to the base, the mean difference makes 100 % of the triangles blue and keeps 49 % of the other answers; the blue direction of the same length 100 % and 22 %.
#
# What had to come out, did: nothing differs before the shaded blocks, and the stream put in whole after them is the tuned model
# (both are asserted). What the tools add is which of the shaded parts decides, and at which position. A direction carries the new answer, not the
# condition for it: it is added to every question, and the tuned model changes only some. How much that spoils is in the last figure.

# %%
kept = torch.cat([after[kind] == before[kind] for kind in OTHERS])
into = {(part, block): float(values[block].mean()) for part, values in into_base.items() for block in range(L)}
out_of = {(part, block): float(values[block].mean()) for part, values in into_tuned.items() for block in range(L)}
(best, where), (best_out, where_out) = max(into, key=into.get), max(out_of, key=out_of.get)
together = stream.to_dataframe().set_index(["place", "span"])["explained"]
full, plain = steering.loc[("mean difference", 1.0)], steering.loc[("blue direction", 1.0)]
print(
    f"Of {len(items[CHANGED])} triangles that are not blue the base calls {100 * (before[CHANGED] == blue).double().mean():.0f} % blue and the tuned model "
    f"{100 * (after[CHANGED] == blue).double().mean():.0f} %; {100 * kept.double().mean():.0f} % of {len(kept)} other answers stay."
)
print(
    f"The lens reads the same in both up to layer {min(adapted)}; the readings are 0.01 apart or more from layer {parted} on, and "
    f"{apart[CHANGED][-1].mean():.2f} at the output ({gaps['questions that stay'][-1].mean():.2f} on questions that stay)."
)
print(
    f"After the adapted blocks the stream at the last position carries {together[name, 'last']:.2f} of the change, that at the image "
    f"{round(together[name, 'image'], 2) + 0:.2f}."
)
print(
    f"Into the base, the output that explains most is that of the {best} of block {where} ({into[best, where]:.2f}); into the tuned model, that of "
    f"the {best_out} of block {where_out} ({out_of[best_out, where_out]:.2f})."
)
print(
    f"Added to the base, the mean difference makes {100 * full['triangles called blue']:.0f} % of the triangles blue and keeps "
    f"{100 * full['other answers that stay']:.0f} % of the other answers; the blue direction of the same length "
    f"{100 * plain['triangles called blue']:.0f} % and {100 * plain['other answers that stay']:.0f} %."
)
