"""Domain neurons: the formula by brute force, counts by hand, planted neurons, and what switching off does."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import picture
from PIL import Image
from tiny import tiny_hf, tiny_processor
from transformer_lens.model_bridge import TransformerBridge

from analyses.data.examples import Example, LeftOut
from analyses.domain_neurons import (
    SOURCES,
    DomainNeurons,
    FiringCounter,
    Firings,
    count_firings,
    disable_neurons,
    domain_entropy,
    find_domain_neurons,
    masks_of,
    mean_activations,
    select_neurons,
    token_sources,
)
from analyses.experiments import neurons as experiment
from analyses.experiments.max_activating import top_images, written_tokens
from analyses.experiments.neurons import FIRING, NONE, RANDOM, RANDOM_RATE, Ablations, Condition, FiringExperiment, read_firings
from analyses.logit_lens import logit_lens
from analyses.runs.engine import run
from analyses.runs.plan import size_by_model
from analyses.runs.sums import write_sums
from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.cli import main

MODULES = ("decoder", "vision", "projector")
FLOAT_TOL = 1e-12  # float64 sums in another order


def a_dataset(n: int = 6) -> list[Example]:
    sizes = [(84, 56), (56, 56), (60, 115)]
    return [Example(f"e{i}", "what is this?" if i % 2 else "red?", "", (picture(*sizes[i % 3], seed=i),), "ab"[i % 2]) for i in range(n)]


# ---- the formula ------------------------------------------------------------------------------------


def by_hand(rates, share, quantile):
    """The method's five lines, with loops and lists."""
    n_layers, n_neurons, n_domains = rates.shape
    values = rates.tolist()
    every = sorted(p for layer in values for neuron in layer for p in neuron)
    threshold = every[round(quantile * len(every)) - 1]
    scored = []
    for layer in range(n_layers):
        for neuron in range(n_neurons):
            p = values[layer][neuron]
            q = [x / sum(p) if sum(p) else 0.0 for x in p]
            dape = -sum(x * math.log(x) for x in q if x > 0)
            if not any(x > threshold for x in p):
                dape = math.inf
            scored.append((dape, layer, neuron))
    chosen = [s for s in sorted(scored)[: round(share * (n_layers * n_neurons))] if s[0] < math.inf]
    belongs = {(layer, neuron): [p > threshold for p in values[layer][neuron]] for _, layer, neuron in chosen}
    return scored, belongs, threshold


@pytest.mark.parametrize("quantile", [0.95, 0.6])
def test_the_formula_by_brute_force(quantile):
    rates = torch.randint(0, 1000, (3, 70, 4)).double().clamp(max=980) / 999  # ties at the top, some zeros
    rates[1, 5:9] = 0
    ours = select_neurons(rates, 0.05, quantile)
    scored, belongs, threshold = by_hand(rates, 0.05, quantile)
    assert ours.threshold == threshold
    theirs = torch.tensor([dape for dape, _, _ in scored], dtype=torch.float64).view(3, 70)
    assert torch.allclose(ours.dape, theirs, rtol=0, atol=FLOAT_TOL) and ours.dape.isinf().any()
    assert {tuple(s) for s in ours.selected.nonzero().tolist()} == set(belongs)
    assert all(ours.belongs[layer, neuron].tolist() == yes for (layer, neuron), yes in belongs.items())


def test_dape_identities():
    rates = torch.rand(2, 50, 5, dtype=torch.float64)
    rates[0, 0] = torch.tensor([0, 0, 0.7, 0, 0])
    rates[0, 1] = 0.3
    rates[0, 2] = 0
    dape = domain_entropy(rates)
    assert dape[0, 0] == 0 and dape[0, 2] == 0
    assert abs(dape[0, 1] - math.log(5)) < FLOAT_TOL
    assert dape.min() >= 0 and dape.max() <= math.log(5) + FLOAT_TOL
    ours = select_neurons(rates, 0.1)
    assert ours.selected.sum() == ours.wanted == round(0.1 * 100)
    assert not ours.selected[0, 2]  # never fires: entropy 0, but the filter leaves it out
    order = torch.tensor([3, 1, 4, 0, 2])
    permuted = select_neurons(rates[..., order], 0.1)
    assert torch.equal(permuted.belongs, ours.belongs[..., order])
    assert torch.allclose(permuted.dape, ours.dape, rtol=0, atol=FLOAT_TOL)


def test_scaling_the_counts_changes_nothing():
    fired, tokens = torch.randint(0, 50, (3, 3, 2, 60)), torch.full((3, 3), 50)
    one, other = (Firings({"decoder": n * fired}, {"decoder": n * tokens}, ("a", "b", "c"), "m").select() for n in (1, 7))
    assert torch.equal(one.modules["decoder"].belongs, other.modules["decoder"].belongs)


def test_few_pass_the_filter():
    """Where most rates tie at the top nothing lies above the threshold: fewer neurons, and it is said how many."""
    ours = select_neurons(torch.ones(2, 50, 3), 0.1)
    assert ours.selected.sum() == 0 and ours.wanted == 10 and ours.dape.isinf().all()


# ---- counts -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_bfloat16():
    return HookedQwen2VL.from_hf(tiny_hf(dtype=torch.bfloat16), tiny_processor())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["batch", "two images", "image and video"])
def test_counts_by_hand(model, in_bfloat16, batches, kind, dtype):
    model, inputs = model if dtype == "float32" else in_bfloat16, batches[kind]
    domains = [f"d{row % 2}" for row in range(len(inputs))]
    counter = FiringCounter(model)
    counter.add(model, inputs, domains)
    ours = counter.result("m")
    # only these: who listens to attention patterns makes them differ by a rounding
    _, cache = model.run_with_cache(inputs, names_filter=lambda name: name.endswith("hook_pre"))
    for module in MODULES:
        fired, tokens = torch.zeros_like(ours.fired[module]), torch.zeros_like(ours.tokens[module])
        for layer in range(fired.shape[2]):
            for domain, source, active in hand_counted(model, inputs, cache, module, layer, domains):
                fired[ours.domains.index(domain), SOURCES.index(source), layer] += active.long()
                tokens[ours.domains.index(domain), SOURCES.index(source)] += layer == 0
        assert torch.equal(ours.fired[module], fired) and torch.equal(ours.tokens[module], tokens)
        assert fired.any()


def hand_counted(model, inputs, cache, module, layer, domains):
    """(domain, source, which neurons fire) of every token, one at a time."""
    if module == "decoder":
        pre = cache[f"blocks.{layer}.mlp.hook_pre"]
        for row, names in enumerate(inputs.segments):
            for position, name in enumerate(names):
                if name != "padding":
                    source = "image" if name.startswith(("image[", "video[")) else "generated" if name == "answer" else "text"
                    yield domains[row], source, pre[row, position] > 0
        return
    name = f"vision_encoder.blocks.{layer}.mlp.hook_pre" if module == "vision" else "vision_projector.hook_pre"
    rows = iter(cache.vision[name][0])
    for visual in inputs.visuals:
        for _ in range(visual.n_patches if module == "vision" else visual.n_tokens):
            yield domains[visual.row], "image", next(rows) > 0


def test_on_transformer_lens_own_model(model, tmp_path):
    """The same text weights in a TransformerLens bridge: the same counts, and the same logits when switched off."""
    bridge = TransformerBridge.boot_transformers(str(model.export_text_model(tmp_path)), device="cpu", dtype=torch.float32)
    tokens, found, logits = torch.randint(0, 250, (2, 20)), [], []
    for one in (model, bridge):
        counter = FiringCounter(one, ["decoder"])
        counter.add(one, tokens, ["a", "b"])
        found.append(counter.result("m"))
        with torch.no_grad(), disable_neurons(one, [("decoder", 1, 3)]):
            logits.append(one(tokens))
    assert same(*found) and found[0].tokens["decoder"].tolist() == [[0, 20, 0], [0, 20, 0]]
    assert (logits[0] - logits[1]).abs().max() < 1e-5 and (logits[0] - model(tokens)).abs().max() > 1e-2


def test_counting_changes_nothing_and_leaves_no_hook(model, batches):
    inputs = batches["batch"]
    with torch.no_grad():
        before = model(inputs)
        counter = FiringCounter(model)
        with counter.counting(model, inputs, ["a"] * 4):
            during = model(inputs)
        assert torch.equal(before, during) and torch.equal(before, model(inputs))
    assert not any(hook._forward_hooks for hook in model.hook_dict.values())


def test_generated_tokens(model):
    """What decoding with a cache ran, row by row: the counts' answer tokens, without the end token."""
    data = a_dataset(4)
    ours = count_firings(model, data, batch_size=4, generate=5, progress=False)
    names = [f"blocks.{layer}.mlp.hook_pre" for layer in range(model.cfg.n_layers)]
    tokens, n_fired = 0, torch.zeros(model.cfg.n_layers, 72)
    for example in data:
        inputs = model.to_inputs(example.question, images=list(example.images))
        done, cache = model.generate(
            inputs, max_new_tokens=5, do_sample=False, return_type="inputs", return_cache=True, names_filter=names,
            verbose=False,
        )  # fmt: skip
        answer = done.positions("answer")
        answer = answer[~torch.isin(done.tokens[0, answer], torch.tensor(model.cfg.special.eos))]
        tokens += len(answer)
        n_fired += torch.stack([(cache[name][0, answer] > 0).sum(0) for name in names])
    source = SOURCES.index("generated")
    assert ours.tokens["decoder"][:, source].sum() == tokens
    # steps with a cache and one forward differ by float rounding: at most a few activations may cross 0
    assert (ours.fired["decoder"][:, source].sum(0) - n_fired).abs().sum() <= 2
    prompts = count_firings(model, data, batch_size=4, progress=False)
    assert torch.equal(prompts.tokens["decoder"][:, :source], ours.tokens["decoder"][:, :source])
    assert torch.equal(prompts.fired["vision"], ours.fired["vision"])
    assert (prompts.fired["decoder"][:, :source] - ours.fired["decoder"][:, :source]).abs().sum() <= 20


def test_the_end_token_of_an_answer_does_not_count(model):
    end = model.cfg.special.eos[0]
    inputs = model.to_inputs(["what?", "red?"], images=[[picture(56, 56)], []], answers=["red", None])
    inputs = inputs.extend(torch.tensor([end, 5]), torch.tensor([True, True]))
    sources = token_sources(inputs, model.cfg.special.eos)
    assert sources[0, -2:].tolist() == [SOURCES.index("generated"), -1] and sources[1, -1] == SOURCES.index("generated")
    prompt = (inputs.tokens == end) & (sources >= 0)
    assert prompt.any() and (sources[prompt] == SOURCES.index("text")).all()  # the chat's own ends are text


def same(one: Firings, other: Firings) -> bool:
    order = [other.domains.index(domain) for domain in one.domains]
    return sorted(one.domains) == sorted(other.domains) and all(
        torch.equal(getattr(one, kind)[m], getattr(other, kind)[m][order]) for kind in ("fired", "tokens") for m in one.fired
    )


def counting_run(model, data, out, generate=2, **more):
    """A run in small parts, of batches of one domain."""
    size = size_by_model(model, by_domain=True)
    small = {"batch_size": 2, "batches_per_shard": 2, "progress": False}
    return run("firings", data, FiringExperiment(model, generate), out, {"generate": generate}, model=model, size=size,
               write=write_sums, **small, **more)  # fmt: skip


def test_a_run_gives_what_memory_gives(model, tmp_path):
    """The same batches one after another, in memory: the same counts, exactly; then the same neurons without the model."""
    data = a_dataset(12)
    state = counting_run(model, data, tmp_path)
    assert state.plan.groupby("batch")["domain"].nunique().max() == 1
    stream = [data[item] for item in state.plan.sort_values(["batch", "item"])["item"]]
    sizes = state.plan.groupby("batch").size()
    assert sizes.nunique() == 1  # so that memory's batches are these
    whole = count_firings(model, stream, batch_size=int(sizes.iloc[0]), generate=2, progress=False)
    assert same(read_firings(tmp_path), whole) and whole.tokens["decoder"].sum() > 0
    assert read_firings(tmp_path).select().to_dataframe().equals(whole.select().to_dataframe())
    tower = sum(visual.n_patches for e in data for visual in model.to_inputs(e.question, images=list(e.images)).visuals)
    assert whole.tokens["vision"].sum() == tower


def test_shares_and_interruptions_change_no_count(model, tmp_path):
    data = a_dataset(12)
    counting_run(model, data, tmp_path / "one")
    for k in (1, 0):
        with pytest.raises(ValueError, match="not finished|holds no run"):
            read_firings(tmp_path / "two")
        counting_run(model, data, tmp_path / "two", rank=(k, 2))
    assert same(read_firings(tmp_path / "one"), read_firings(tmp_path / "two"))

    def breaking():
        yield from data[:8]
        raise KeyboardInterrupt

    turns = iter([data, breaking()])
    with pytest.raises(KeyboardInterrupt):
        counting_run(model, lambda: next(turns), tmp_path / "cut", window=4)
    assert 0 < len(list((tmp_path / "cut").glob("part-*")))
    counting_run(model, data, tmp_path / "cut", window=4)
    counting_run(model, data, tmp_path / "windows", window=4)
    assert same(read_firings(tmp_path / "cut"), read_firings(tmp_path / "windows"))
    with pytest.raises(ValueError, match="settings.generate: 2 there, 0 now"):
        counting_run(model, data, tmp_path / "one", generate=0)


def test_the_tower_runs_once_an_image(model, monkeypatch):
    """Two questions about one image: its patches count for both, to the number, with one run of the tower."""
    one, other = (picture(84, 56, seed) for seed in (1, 2))
    data = [Example(f"{i}", text, "", (image,), "ab"[i % 2]) for i, (text, image) in
            enumerate([("what?", one), ("red?", one), ("what?", other)])]  # fmt: skip
    calls, run_tower = [], type(model).run_tower
    monkeypatch.setattr(type(model), "run_tower", lambda self, i: calls.append(1) or run_tower(self, i))
    counts = count_firings(model, data, batch_size=2, progress=False)
    assert len(calls) == 2 and counts.tokens["vision"][:, 0].tolist() == [2 * 24, 24]
    alone = count_firings(model, data[1:2], progress=False)
    for module in ("vision", "projector"):
        assert torch.equal(counts.fired[module][1], alone.fired[module][0]) and alone.fired[module].any()


def test_sums_of_floats_do_not_depend_on_who_wrote_them(model, tmp_path):
    data = questions(8)

    def effects(out, **more):
        return run("effects", data, experiment.EffectExperiment(model), out, model=model, batch_size=2, batches_per_shard=1,
                   progress=False, write=write_sums, **more)  # fmt: skip

    effects(tmp_path / "one")
    for k in (1, 0):
        effects(tmp_path / "two", rank=(k, 2))
    one, two = (experiment.read_effects(tmp_path / name, ["a", "b"]) for name in ("one", "two"))
    whole = experiment.ablation_effects(model, data, ["a", "b"], batch_size=8)
    for module in MODULES:
        assert torch.equal(one[module], two[module])
        assert torch.allclose(one[module], whole[module], rtol=1e-4, atol=1e-6) and one[module].abs().max() > 1e-3
    with pytest.raises(ValueError, match="expected a, b, c"):
        experiment.read_effects(tmp_path / "one", ["a", "b", "c"])


def test_rates_are_refused_where_nothing_was_seen(model):
    counts = count_firings(model, a_dataset(2), progress=False)
    with pytest.raises(ValueError, match="no token of generated"):
        counts.rates("decoder", ["generated"])
    with pytest.raises(ValueError, match="no module 'brain'"):
        counts.rates("brain")
    with pytest.raises(ValueError, match="no domain"):
        count_firings(model, [Example("x", "what?", "")], progress=False)


# ---- planted neurons --------------------------------------------------------------------------------


@torch.no_grad()
def planted_decoder() -> tuple[HookedQwen2VL, dict]:
    """Coordinate k of the stream is positive exactly on domain k's tokens; planted gates read it, nothing else does."""
    hf, kept = tiny_hf(), [0, 1, 2]
    text = hf.model.language_model
    text.embed_tokens.weight[:, kept] = -0.4
    for k in kept:
        text.embed_tokens.weight[30 * (k + 1) : 30 * (k + 2), k] = 0.4
    planted = {(0, 5): 0, (0, 70): 1, (1, 1): 1, (1, 2): 2, (2, 0): 0, (2, 71): 2}
    for layer, block in enumerate(text.layers):
        block.self_attn.o_proj.weight[kept] = 0
        block.mlp.down_proj.weight[kept] = 0
        block.post_attention_layernorm.weight[kept] = 1
        block.mlp.gate_proj.weight[:, kept] = 0
        for (there, neuron), domain in planted.items():
            if there == layer:
                block.mlp.gate_proj.weight[neuron] = 0
                block.mlp.gate_proj.weight[neuron, domain] = 1
    return HookedQwen2VL.from_hf(hf, tiny_processor()), planted


def test_planted_in_the_decoder():
    model, planted = planted_decoder()
    counter = FiringCounter(model)
    for domain in (2, 0, 1, 1, 0, 2):
        tokens = torch.randint(30 * (domain + 1), 30 * (domain + 2), (4, 60))
        counter.add(model, tokens, [f"domain {domain}"] * 4)
    counts = counter.result("m")
    assert set(counts.fired) == {"decoder"}  # no image was seen
    found = counts.select(share=len(planted) / (3 * 72)).modules["decoder"]
    ours = {
        (layer, neuron): [int(d[-1]) for d, yes in zip(counts.domains, found.belongs[layer, neuron].tolist()) if yes]
        for layer, neuron in found.selected.nonzero().tolist()
    }
    assert ours == {place: [domain] for place, domain in planted.items()}
    assert all(found.dape[place] == 0 for place in planted)


@torch.no_grad()
def planted_tower() -> HookedQwen2VL:
    """Coordinate 0 of the tower is red minus blue; one neuron of each kind in vision layer 1 and in the projector reads it."""
    hf = tiny_hf()
    tower = hf.model.visual
    weight = tower.patch_embed.proj.weight  # [d_vision, channel, frame, row, col]
    weight.normal_(0, weight[0].numel() ** -0.5)
    weight -= weight.mean((2, 3, 4), keepdim=True)  # blind to a patch's mean colour
    weight[0] = 0
    weight[0, 0], weight[0, 2] = 1 / weight[0, 0].numel(), -1 / weight[0, 0].numel()
    for block in tower.blocks:
        block.attn.qkv.weight[:, 0] = 0
        block.attn.proj.weight[0], block.attn.proj.bias[0] = 0, 0
        block.mlp.fc2.weight[0], block.mlp.fc2.bias[0] = 0, 0
        block.norm2.weight[0], block.norm2.bias[0] = 1, 0
        block.mlp.fc1.weight[:, 0] = 0
    for block in tower.blocks:  # else much of the stream is the same for every picture, and neurons fire always or never
        block.attn.proj.weight.mul_(0.3), block.mlp.fc2.weight.mul_(0.3), block.mlp.fc2.bias.zero_(), block.attn.proj.bias.zero_()
    tower.merger.ln_q.weight[0] = 1
    tower.merger.ln_q.bias.zero_(), tower.merger.mlp[0].bias.zero_()
    reads = torch.arange(0, 4 * 48, 48)
    tower.merger.mlp[0].weight[:, reads] = 0
    for layer, columns in ((tower.blocks[1].mlp.fc1, [0]), (tower.merger.mlp[0], reads)):
        for neuron, sign in ((11, 1.0), (60, -1.0)):
            layer.weight[neuron], layer.bias[neuron] = 0, 0
            layer.weight[neuron, columns] = sign
    return HookedQwen2VL.from_hf(hf, tiny_processor())


def tinted(seed: int, red: bool) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 130, (56, 84, 3), dtype=np.uint8)
    pixels[..., 0 if red else 2] += 125
    return Image.fromarray(pixels)


def test_planted_in_tower_and_projector():
    model = planted_tower()
    data = [Example(f"{i}", "what?", "", (tinted(i, i % 2 == 0),), ("red", "blue")[i % 2]) for i in range(16)]
    found = find_domain_neurons(model, data, modules=["vision", "projector"], progress=False)
    for module, layer in (("vision", 1), ("projector", 0)):
        assert found.modules[module].wanted == 2
        for domain, neuron in (("red", 11), ("blue", 60)):
            assert found.masks(domain)[module].nonzero().tolist() == [[layer, neuron]]
        assert found.masks()[module].nonzero().tolist() == [[layer, 11], [layer, 60]]
        table = found.to_dataframe().set_index(["module", "layer", "neuron"])
        assert len(table) == 4 and table.loc[(module, layer, 11), ["domains", "dape_nats", "rate_blue"]].tolist() == ["red", 0, 0]
        assert table.loc[(module, layer, 60), "rate_blue"] > 0
        assert found.modules[module].dape[layer, [11, 60]].tolist() == [0, 0]


# ---- switching off ----------------------------------------------------------------------------------

SOME = [("decoder", 0, 3), ("decoder", 2, 71), ("vision", 1, 7), ("projector", 0, 100)]


@pytest.fixture(scope="module")
def prompt(model):
    return model.to_inputs("is it red?", images=[picture(84, 56, 1)])


@torch.no_grad()
def test_an_empty_mask_is_bit_identical(model, prompt):
    empty = {m: torch.zeros_like(mask) for m, mask in masks_of(model, SOME).items()}
    before = model(prompt)
    with disable_neurons(model, empty), disable_neurons(model, []):
        assert torch.equal(model(prompt), before)
    with disable_neurons(model, SOME):
        assert not torch.allclose(model(prompt), before, atol=1e-4)
    assert torch.equal(model(prompt), before)


@torch.no_grad()
@pytest.mark.parametrize("neuron", SOME)
def test_disabling_is_zeroing_the_row_of_W_out(prompt, neuron):
    model = HookedQwen2VL.from_hf(tiny_hf(), tiny_processor())
    module, layer, j = neuron
    before = model(prompt)
    with disable_neurons(model, [neuron]):
        ours = model(prompt)
    at = {"decoder": model.blocks, "vision": model.vision_encoder.blocks}.get(module)
    (model.vision_projector if at is None else at[layer].mlp).W_out[j] = 0
    assert torch.allclose(ours, model(prompt), rtol=0, atol=1e-6)
    assert not torch.allclose(ours, before, rtol=0, atol=1e-6)


@torch.no_grad()
def test_in_cached_generation(model, prompt):
    """The switched-off model's continuation, with and without a cache, on every step; and it is another one."""
    many = {"decoder": torch.rand(model.cfg.n_layers, 72) < 0.5}
    settings = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
    untouched = model.generate(prompt, **settings)
    with disable_neurons(model, many):
        cached, plain = (model.generate(prompt, use_past_kv_cache=c, **settings) for c in (True, False))
        _, cache = model.generate(
            prompt, **settings, return_cache=True, names_filter=[f"blocks.{layer}.mlp.hook_post" for layer in range(3)]
        )
    assert torch.equal(cached, plain) and not torch.equal(cached, untouched)
    for layer in range(3):
        post = cache[f"blocks.{layer}.mlp.hook_post"]
        assert post.shape[1] == cached.shape[1] and (post[..., many["decoder"][layer]] == 0).all()


@torch.no_grad()
def test_mean_ablation(model):
    data = a_dataset(4)
    means = mean_activations(model, data, batch_size=3)
    posts: dict = {}
    for example in data:
        inputs = model.to_inputs(example.question, images=list(example.images))
        _, cache = model.run_with_cache(inputs, vision=True)
        names = {"decoder": "blocks.2.mlp.hook_post", "vision": "vision_encoder.blocks.1.mlp.hook_post",
                 "projector": "vision_projector.hook_post"}  # fmt: skip
        for module, name in names.items():
            posts.setdefault(module, []).append(cache[name][0])
    for module, several in posts.items():
        assert torch.allclose(means[module][-1], torch.cat(several).mean(0), atol=1e-5)
    with disable_neurons(model, SOME, values=means):
        _, cache = model.run_with_cache(inputs, vision=True)
    for module, layer, j in SOME:
        name = {"decoder": f"blocks.{layer}.mlp", "vision": f"vision_encoder.blocks.{layer}.mlp"}.get(module, "vision_projector")
        assert (cache[f"{name}.hook_post"][..., j] == means[module][layer, j]).all()


def test_what_is_not_there_is_refused(model):
    for wrong in ([("decoder", 9, 0)], [("decoder", 0, 72)], [("brain", 0, 0)], {"decoder": torch.zeros(2, 72).bool()},
                  {"vision": torch.zeros(2, 96)}):  # fmt: skip
        with pytest.raises(ValueError), disable_neurons(model, wrong):
            pass


# ---- the experiment ---------------------------------------------------------------------------------


def questions(n: int = 6) -> list[Example]:
    answers = ("blue", "red red", "th")
    return [
        Example(f"q{i}", "what?" if i % 2 else "is it red?", answers[i % 3], (picture(56, 56 + 28 * (i % 2), seed=i),), "ab"[i % 2])
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def batches_of_questions(model):
    return experiment.prepare(model, questions(), batch_size=2)


def test_effects_are_derivatives():
    """Scaling one activation by 1 − ε: the loss of log p, by central differences in float64."""
    model = HookedQwen2VL.from_hf(tiny_hf(dtype=torch.float64), tiny_processor())
    data = questions(4)
    effects = experiment.ablation_effects(model, data, ["b", "a"], batch_size=4)

    def log_p(domain: str, name: str, neuron: int, epsilon: float) -> float:
        def shrink(post, hook):
            scale = torch.ones(post.shape[-1], dtype=post.dtype)
            scale[neuron] = 1 - epsilon
            return post * scale

        total = []
        for example in data:
            if example.domain == domain:
                inputs = model.to_inputs(example.question, images=list(example.images), answers=example.answer)
                with torch.no_grad():
                    logits = model.run_with_hooks(inputs, fwd_hooks=[(name, shrink)]).log_softmax(-1)
                answer = inputs.positions("answer")
                total.append(logits[0, answer - 1, inputs.tokens[0, answer]].sum().item())
        return sum(total) / len(total)

    epsilon = 1e-4
    for module, layer, neuron, name in (("decoder", 1, 5, "blocks.1.mlp"), ("vision", 0, 9, "vision_encoder.blocks.0.mlp"),
                                        ("projector", 0, 3, "vision_projector")):  # fmt: skip
        for number, domain in enumerate(["b", "a"]):
            low, high = (log_p(domain, f"{name}.hook_post", neuron, e) for e in (-epsilon, epsilon))
            slope = (low - high) / (2 * epsilon)
            assert abs(float(effects[module][number, layer, neuron]) - slope) < 1e-5 * max(1, abs(slope))
            assert abs(slope) > 1e-6


def test_effects_are_of_the_domains_that_were_asked_for(model):
    for domains in (["a"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match="the items to attribute are of the domains a, b"):
            experiment.ablation_effects(model, questions(4), domains, batch_size=4)


def test_the_strongest_by_contrast():
    effects = torch.zeros(3, 2, 4)
    effects[:, 0, 1] = 5.0  # helps every domain alike
    effects[0, 1, 2], effects[2, 1, 3] = 1.0, 2.0
    assert experiment.strongest(effects, 0, 1).nonzero().tolist() == [[1, 2]]
    assert experiment.strongest(effects, 2, 1).nonzero().tolist() == [[1, 3]]


def test_controls_are_what_they_say():
    rates = torch.rand(3, 200, dtype=torch.float64)
    mask, barred = torch.zeros(3, 200, dtype=torch.bool), torch.rand(3, 200) < 0.1
    mask[0, rates[0].argsort()[-6:]] = True  # frequent firers
    mask[2, :4] = True
    for matched in (None, rates):
        drawn = experiment.random_like(mask, barred, np.random.default_rng(0), matched)
        assert torch.equal(drawn.sum(1), mask.sum(1)) and not (drawn & (mask | barred)).any()
        gap = abs(rates[0][drawn[0]].mean() - rates[0][mask[0]].mean())
        assert gap < 0.1 if matched is not None else gap > 0.2
    with pytest.raises(ValueError, match="other neurons"):
        experiment.random_like(mask, ~mask, np.random.default_rng(0))


def test_every_condition_is_there():
    fired = torch.randint(0, 400, (2, 3, 2, 100))
    counts = Firings({"decoder": fired, "vision": fired}, {m: torch.full((2, 3), 500) for m in ("decoder", "vision")},
                     ("a", "b"), "m")  # fmt: skip
    neurons = counts.select(0.05)
    found = experiment.conditions(neurons, {m: torch.randn(2, 2, 100) for m in ("decoder", "vision")}, seeds=2)
    assert len(found) == 2 * 3 * (1 + 2 + 2 + 1 + 2) and len({(c.selection, c.module, c.target, c.seed) for c in found}) == len(found)
    for condition in found:
        assert condition.n_neurons == sum(int(m.sum()) for m in neurons.masks(condition.target, list(condition.masks)).values())
        if condition.selection in (RANDOM, RANDOM_RATE):
            assert not any((mask & neurons.modules[m].selected).any() for m, mask in condition.masks.items())


def test_overlaps_count_the_neurons_of_both_domains():
    rates = torch.rand(3, 40, 3, generator=torch.Generator().manual_seed(2))
    found = select_neurons(rates, 0.2)
    table = DomainNeurons({"decoder": found}, ("a", "b", "c"), ("text",), "m").overlaps()
    assert len(table) == 9 and table["module"].eq("decoder").all()
    for row in table.itertuples():
        one, two = ("abc".index(name) for name in (row.domain, row.other))
        assert row.neurons == sum(bool(n[one] and n[two]) for layer in found.belongs for n in layer)
    assert table["neurons"].sum() > 0


def test_a_control_matches_the_rates_of_its_own_domain():
    """The rate-matched control of each domain is drawn by that domain's rates, not by another's."""
    generator = torch.Generator().manual_seed(0)
    rates = torch.rand(2, 400, 3, generator=generator, dtype=torch.float64)
    neurons = DomainNeurons({"decoder": select_neurons(rates, 0.05)}, ("a", "b", "c"), ("text",), "m")
    for condition in experiment.conditions(neurons, seeds=2):
        if condition.selection == RANDOM_RATE:
            own, drawn = neurons.masks(condition.target)["decoder"], condition.masks["decoder"]
            gaps = []
            for domain in range(3):
                pairs = [
                    (rates[layer, own[layer], domain].sort().values, rates[layer, drawn[layer], domain].sort().values) for layer in range(2)
                ]
                gaps.append(float(torch.cat([(x - y).abs() for x, y in pairs]).mean()))
            wanted = neurons.domains.index(condition.target)
            assert gaps[wanted] < 0.05 and gaps[wanted] == min(gaps), (condition.target, gaps)


def test_answers_one_by_one(model, batches_of_questions):
    """Batched answers and log-probabilities against each question alone; a model with most of its neurons off."""
    many = {"decoder": torch.rand(3, 72) < 0.6}
    conditions = [Condition(FIRING, "decoder", "a", 0, many), Condition(RANDOM, "decoder", "a", 0, {"decoder": torch.zeros(3, 72).bool()})]
    found = experiment.ablate(model, batches_of_questions, conditions, progress=False).outcomes
    assert len(found) == 6 + 6 + 3  # untouched; own, on both domains; control, on its own
    for example in questions():
        inputs = model.to_inputs(example.question, images=list(example.images))
        first = model.to_tokens(example.answer)[0, 0]
        for selection, off in ((NONE, []), (FIRING, many)):
            with disable_neurons(model, off), torch.no_grad():
                text = model.generate(inputs, max_new_tokens=9, do_sample=False, return_type="str", verbose=False)
                log_prob = model(inputs)[0, -1].log_softmax(-1)[first].item()
            (row,) = found.query("selection == @selection and id == @example.id").to_dict("records")
            assert row["right"] == experiment.same_answer(text, example.answer) and row["domain"] == example.domain
            assert abs(row["log_prob"] - log_prob) < 1e-4
    gap = found.query("selection == 'firing'").set_index("id")["log_prob"] - found.query("selection == 'none'").set_index("id")["log_prob"]
    assert gap.abs().min() > 1e-3


def test_an_answer_is_given_up_at_twice_the_right_ones_length_and_a_few_tokens(model, batches_of_questions, monkeypatch):
    asked, generate = [], model.generate

    def watch(*args, max_new_tokens, **options):
        asked.append(max_new_tokens)
        return generate(*args, max_new_tokens=max_new_tokens, **options)

    monkeypatch.setattr(model, "generate", watch)
    for batch in batches_of_questions:
        experiment.answer(model, batch)
        lengths = [model.to_tokens(text).shape[1] for text in batch.answers]
        assert asked[-1] == 2 * max(lengths) + experiment._SPARE_TOKENS


def test_right_is_the_whole_answer():
    assert experiment.same_answer(" Red. ", "red") and experiment.same_answer("2 red", "2 red")
    assert not experiment.same_answer("red red", "red") and not experiment.same_answer("reddish", "red")


def a_table() -> Ablations:
    """Two domains of four questions on two images each; 'a' loses half when its own are off, nothing under the control."""
    rows = []
    for domain in "ab":
        for i in range(4):
            about = {"id": f"{domain}{i}", "image": f"{domain}{i // 2}", "domain": domain}
            rows.append(
                {"selection": NONE, "module": "all", "target": "", "seed": 0, "neurons": 0, **about, "right": i < 3, "log_prob": -1.0}
            )
            for target in "ab":
                lost = target == domain == "a" and i < 2
                rows.append({"selection": FIRING, "module": "decoder", "target": target, "seed": 0, "neurons": 7, **about,
                             "right": i < 3 and not lost, "log_prob": -2.0 if lost else -1.0})  # fmt: skip
            for seed in (0, 1):
                rows.append({"selection": RANDOM, "module": "decoder", "target": domain, "seed": seed, "neurons": 7, **about,
                             "right": i < 3, "log_prob": -1.0})  # fmt: skip
    return Ablations(pd.DataFrame(rows), "m")


def test_tables_by_hand(tmp_path):
    a_table().save(tmp_path / "outcomes.safetensors")
    table = Ablations.load(tmp_path / "outcomes.safetensors")
    assert table.model_name == "m" and table.outcomes.equals(a_table().outcomes)
    accuracy = table.accuracy().set_index(["selection", "module", "domain"])
    assert accuracy.loc[(NONE, "all", "a"), "accuracy"] == 0.75 and accuracy.loc[(FIRING, "decoder", "a"), "accuracy"] == 0.25
    assert accuracy.loc[(FIRING, "decoder", "a"), "change"] == -0.5 and accuracy.loc[(FIRING, "decoder", "b"), "change"] == 0
    assert accuracy.loc[(FIRING, "decoder", "all"), ["items", "change", "neurons"]].tolist() == [8, -0.25, 7]
    excess = table.against_controls().set_index("domain")
    assert excess.loc["a", ["excess", "excess_log_prob"]].tolist() == [-0.5, -0.5]
    assert excess.loc["a", ["excess_low", "excess_high"]].tolist() == [-1, 0]  # the two that are lost are of one image
    assert excess.loc["b", ["excess", "excess_low", "excess_high"]].tolist() == [0, 0, 0]
    cross = table.cross(FIRING, "decoder")
    assert cross.loc["a"].tolist() == [-0.5, 0] and cross.loc["b"].tolist() == [0, 0]
    with pytest.raises(ValueError, match="own domain only"):
        table.cross(RANDOM, "decoder")


def test_intervals():
    """An accuracy's interval resamples images: questions that all repeat another tell nothing more."""
    rng, widths = np.random.default_rng(0), []
    right = rng.random(60) < 0.7
    for copies in (1, 4):
        rows = [{"selection": NONE, "module": "all", "target": "", "seed": 0, "neurons": 0, "id": f"q{i}-{copy}", "image": f"i{i}",
                 "domain": "a", "right": bool(right[i]), "log_prob": -1.0} for i in range(60) for copy in range(copies)]  # fmt: skip
        row = Ablations(pd.DataFrame(rows), "m").accuracy().iloc[0]
        assert row["accuracy"] == right.mean() and (row["items"], row["images"]) == (60 * copies, 60)
        widths.append(row["high"] - row["low"])
    assert widths[1] / widths[0] == pytest.approx(1, abs=0.1)  # by question it would be half as wide


def test_streams_by_hand(model, batches_of_questions):
    own = Condition(FIRING, "decoder", "a", 0, {"decoder": torch.rand(3, 72) < 0.5})
    table = experiment.stream_by_layer(model, batches_of_questions, [own], progress=False)
    calm = table[table["selection"] == NONE]
    assert (calm["deviation"] == 0).all() and set(table["source"]) == {"image", "text", "last"}
    entropies, moved = [], []
    for example in questions():
        if example.domain == "a":
            inputs = model.to_inputs(example.question, images=list(example.images))
            entropies.append(logit_lens(model, inputs, "image").entropy)
            with torch.no_grad():
                _, before = model.run_with_cache(inputs)
                with disable_neurons(model, own.masks):
                    _, after = model.run_with_cache(inputs)
            difference = after["blocks.2.hook_resid_post"] - before["blocks.2.hook_resid_post"]
            moved.append(float(difference[0, -1].norm() / before["blocks.2.hook_resid_post"][0, -1].norm()))
    ours = calm.query("source == 'image' and domain == 'a'").sort_values("layer")["entropy_nats"].to_numpy()
    assert np.allclose(ours, torch.cat(entropies, 1).mean(1), atol=1e-4)
    ours = table.query("selection == 'firing' and source == 'last' and layer == 3")["deviation"].item()
    assert abs(ours - np.mean(moved)) < 1e-4 and ours > 0.01


def test_no_image_is_on_both_sides():
    data = [Example(f"{i}", "what?", "x", (f"{i // 2}.png",), "ab"[i % 4 // 2]) for i in range(12)]
    chosen, judged = experiment.split_by_image(data)
    assert len(chosen) + len(judged) == 12 and not {e.images for e in chosen} & {e.images for e in judged}
    assert {e.domain for e in chosen} == {e.domain for e in judged} == {"a", "b"}
    with pytest.raises(ValueError, match="one image only"):
        experiment.split_by_image(data[:2])


# ---- pictures ---------------------------------------------------------------------------------------


def test_top_images_by_hand(model):
    data = a_dataset(5)
    for neuron in (("decoder", 1, 4), ("vision", 0, 9), ("projector", 0, 50)):
        top = top_images(model, neuron, data, n=3, batch_size=2)
        highest, grids = {}, {}
        for example in data:
            inputs = model.to_inputs(example.question, images=list(example.images))
            _, cache = model.run_with_cache(inputs, vision=True)
            module, layer, j = neuron
            if module == "decoder":
                pre = cache[f"blocks.{layer}.mlp.hook_pre"][0, inputs.positions("image"), j]
            else:
                name = f"vision_encoder.blocks.{layer}.mlp.hook_pre" if module == "vision" else "vision_projector.hook_pre"
                pre = cache.vision[name][0, :, j]
            highest[example.id], scale = float(pre.max()), 2 if module == "vision" else 1
            grids[example.id] = tuple(scale * n for n in inputs.grid())
        assert [e.id for e in top.examples] == sorted(highest, key=highest.get, reverse=True)[:3]
        assert all(abs(float(e.activations.max()) - highest[e.id]) < 1e-5 for e in top.examples)
        assert all(tuple(e.activations.shape) == grids[e.id] for e in top.examples)


def test_what_a_neuron_writes(model):
    table = written_tokens(model, ("decoder", 2, 7), top_k=3)
    with torch.no_grad():
        logits = (model.blocks[2].mlp.W_out[7] * model.ln_final.w) @ model.W_U
    assert table["token_id"].tolist() == [*logits.topk(3).indices.tolist(), *logits.topk(3, largest=False).indices.tolist()]
    with pytest.raises(ValueError, match="tower"):
        written_tokens(model, ("vision", 0, 0))


def animals(tmp_path, n, domains=("cats", "dogs")):
    """A folder of domains, n images each."""
    for number, domain in enumerate(reversed(domains)):
        (tmp_path / domain).mkdir()
        lines = []
        for i in range(n):
            picture(56, 84, seed=i + n * number).save(tmp_path / domain / f"{i}.png")
            lines.append(json.dumps({"image": f"{i}.png", "question": "what?", "answer": "red"}))
        (tmp_path / domain / "questions.jsonl").write_text("\n".join(lines))


COMMAND = ["neurons", "--seeds", "1", "--generate", "2", "--share", "0.05"]


def test_the_command(tmp_path, capsys, model, monkeypatch):
    animals(tmp_path, 4)
    monkeypatch.setattr("analyses.cli.neurons.load_model", lambda options: model)
    out = tmp_path / "out"
    command = [*COMMAND, "--data", str(tmp_path), "--out", str(out)]
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert all(f"neurons: {stage}: 4 questions" in said for stage in ("firings", "effects", "ablations")) and "memory" in said
    assert not out.exists()
    assert main(command) == 0
    said = capsys.readouterr().out
    for name in ("neurons.csv", "neurons_by_layer.png", "neurons_accuracy.png", "neurons_accuracy.csv", "neurons_controls.png",
                 "neurons_against_controls.csv", "neurons_streams.png", "neurons_write.csv"):  # fmt: skip
        assert str(out / name) in said and (out / name).stat().st_size > 0
    assert read_firings(out / "firings").tokens["decoder"][:, 0].tolist() == [12, 12]  # two images a side
    assert main([*command, "--dry-run"]) == 0 and "under up to" in capsys.readouterr().out
    assert main([*command, "--seeds", "2"]) == 2 and "settings.conditions" in capsys.readouterr().err
    assert main([*command, "--generate", "1"]) == 2 and "settings.generate: 2 there, 1 now" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_in_shares_with_a_bad_image(tmp_path, capsys, model, monkeypatch):
    """Each stage waits for all of the one before; the tables are those of one process."""
    animals(tmp_path, 8)
    monkeypatch.setattr("analyses.cli.neurons.load_model", lambda options: model)
    (tmp_path / "dogs" / "0.png").write_bytes(b"no image")
    command = [*COMMAND, "--data", str(tmp_path), "--batch-size", "1"]
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    assert "2 questions failed, the first (dogs-1)" in capsys.readouterr().out  # in firings, and in effects
    shared = [*command, "--out", str(tmp_path / "two")]
    for rank in ("1/2", "0/2", "1/2"):
        assert not (tmp_path / "two" / "neurons_accuracy.csv").exists()
        assert main([*shared, "--rank", rank]) == 0
    for name in ("neurons", "neurons_outcomes", "neurons_accuracy", "neurons_failures", "neurons_streams"):
        one, two = (pd.read_csv(tmp_path / run / f"{name}.csv") for run in ("one", "two"))
        pd.testing.assert_frame_equal(one, two, check_exact=True)
        assert len(one)


@pytest.mark.slow
def test_limits_are_spread_over_the_domains(tmp_path, capsys, model, monkeypatch):
    """Files in the order of their domains, limits below the size of the first: every domain is selected on and judged."""
    animals(tmp_path, 8, ("ants", "bats", "cats"))
    monkeypatch.setattr("analyses.cli.neurons.load_model", lambda options: model)
    command = [*COMMAND, "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--limit", "4", "--test-limit", "3"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "4 of 12 are kept (domain: ants 2 of 4, bats 1 of 4, cats 1 of 4)" in said
    assert "3 of 12 are kept (domain: ants 1 of 4, bats 1 of 4, cats 1 of 4)" in said
    outcomes = pd.read_csv(tmp_path / "out" / "neurons_outcomes.csv")
    assert outcomes.query("selection == 'none'")["domain"].tolist() == ["ants", "bats", "cats"]
    assert pd.read_csv(tmp_path / "out" / "neurons_accuracy.csv").query("domain == 'all'")["items"].unique().tolist() == [3]
    assert read_firings(tmp_path / "out" / "firings").domains == ("ants", "bats", "cats")
    assert main([*command, "--limit", "0"]) == 2 and "--limit must be at least 1" in capsys.readouterr().err
    files = [Example(f"{d}{i}", "what?", "red", (), d) for d in ("ants", "bats", "cats") for i in range(8)]
    for counting in (count_firings, experiment.count_firings):
        for data in (tmp_path, files):
            with pytest.warns(LeftOut, match="5 of 24 are kept .domain: ants 2 of 8, bats 2 of 8, cats 1 of 8"):
                assert counting(model, data, limit=5, progress=False).domains == ("ants", "bats", "cats")
    with pytest.warns(LeftOut, match="1 of 24"):
        means = mean_activations(model, files, limit=1)
    assert torch.allclose(means["decoder"], mean_activations(model, [e for e in files if e.domain == "ants"][:1])["decoder"])
    with pytest.warns(LeftOut, match="3 of 24"):
        top_images(model, ("decoder", 0, 0), tmp_path, limit=3)


def test_an_ablation_run_gives_what_memory_gives(model, tmp_path):
    """With several questions an image: they are one image in the intervals, as they are for files."""
    shots = [picture(56, 56, seed=i // 2) for i in range(4)]
    data = [Example(f"q{i}", "what?", "blue", (shots[i],), "ab"[i // 2]) for i in range(4)]
    for i, example in enumerate(data):
        shots[i].save(tmp_path / f"{i // 2}.png")
    files = [Example(e.id, e.question, e.answer, (tmp_path / f"{i // 2}.png",), e.domain) for i, e in enumerate(data)]
    own = Condition(FIRING, "decoder", "a", 0, {"decoder": torch.rand(3, 72) < 0.6})
    whole = experiment.ablate(model, experiment.prepare(model, data, batch_size=2), [own], progress=False)
    found = experiment.ablate(model, files, [own], out=tmp_path / "out", batch_size=2, progress=False)
    ours, theirs = (table.outcomes.sort_values(["id", "selection"], ignore_index=True) for table in (found, whole))
    pd.testing.assert_frame_equal(ours[theirs.columns], theirs, check_exact=False, rtol=0, atol=1e-5)
    assert ours["image"].nunique() == 2 and len(ours) == 4 + 4
