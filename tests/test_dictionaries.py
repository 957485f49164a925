"""Dictionaries: the libraries' definitions written out, splices that change nothing, edits by hand, exact attribution, planted features."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import picture
from safetensors.torch import save_file
from tiny import tiny_hf, tiny_processor3

from analyses.data.examples import Example
from analyses.dictionaries import (
    Dictionary,
    ablate_features,
    attribute_features,
    feature_activations,
    feature_maps,
    load_dictionary,
    save_dictionary,
    set_features,
    splice,
    top_activating,
    train_dictionary,
)
from hooked_qwen2vl import HookedQwen2VL

D, N, K = 24, 40, 5
SAME = 1e-5


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def model(request, processor):
    family = request.param
    return HookedQwen2VL.from_hf(tiny_hf(family=family), tiny_processor3() if family == "qwen3_vl" else processor)


def random_dictionary(hook, d_in, d_out=None, hook_out=None, **more):
    generator = torch.Generator().manual_seed(7)
    d_out = d_out or d_in
    shapes = {"W_enc": (d_in, N), "b_enc": (N,), "W_dec": (N, d_out), "b_dec": (d_out,)}
    weights = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return Dictionary(hook, hook_out or hook, **weights, **more)


def stored(folder, config, weights, name="sae_weights.safetensors"):
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / name)
    return folder


def weights_of(kind):
    torch.manual_seed(1)
    w = {"W_enc": torch.randn(D, N), "b_enc": torch.randn(N), "W_dec": torch.randn(N, D), "b_dec": torch.randn(D)}
    if kind == "gated":
        w |= {"b_gate": w.pop("b_enc"), "r_mag": 0.3 * torch.randn(N), "b_mag": torch.randn(N)}
    if "jumprelu" in kind:
        w["threshold"] = torch.rand(N)
    if "skip" in kind:
        w["W_skip"] = torch.randn(D, D)
    return w


def saelens(kind, w, x, centred, normalisation, by_norm):
    """SAELens's forward, as its classes have it, one vector at a time."""
    outs = []
    for one in x:
        back = lambda out: out  # noqa: E731
        if normalisation == "constant_norm_rescale":
            scale = D**0.5 / one.norm()
            one, back = one * scale, lambda out, scale=scale: out / scale
        if normalisation == "layer_norm":
            mean, std = one.mean(), (one - one.mean()).std()
            one, back = (one - mean) / (std + 1e-5), lambda out, mean=mean, std=std: out * std + mean
        given = one - w["b_dec"] if centred else one
        if kind == "gated":
            active = (given @ w["W_enc"] + w["b_gate"] > 0).float()
            f = active * torch.relu(given @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"])
        else:
            pre = given @ w["W_enc"] + w["b_enc"]
            f = torch.relu(pre)
            if "jumprelu" in kind:
                f = f * (pre > w["threshold"]).float()
            if kind == "topk":
                pre = pre * w["W_dec"].norm(dim=-1) if by_norm else pre
                f = torch.zeros(N)
                for index in pre.argsort(descending=True)[:K]:
                    f[index] = torch.relu(pre[index])
        out = (f / w["W_dec"].norm(dim=-1) if by_norm else f) @ w["W_dec"] + w["b_dec"]
        outs.append((f, back(out) + (one @ w["W_skip"].T if "skip" in kind else 0)))
    return tuple(torch.stack(part) for part in zip(*outs))


@pytest.mark.parametrize(
    ("kind", "centred", "normalisation", "by_norm"),
    [
        ("standard", True, "none", False), ("standard", False, "layer_norm", False), ("standard", True, "constant_norm_rescale", False),
        ("topk", True, "none", True), ("topk", True, "none", False), ("jumprelu", False, "none", False), ("gated", True, "none", False),
        ("transcoder", False, "none", False), ("jumprelu_skip_transcoder", False, "none", False),
    ],
)  # fmt: skip
def test_saelens_folders(kind, centred, normalisation, by_norm, tmp_path):
    w = weights_of(kind)
    config = {"architecture": kind, "d_in": D, "d_sae": N, "apply_b_dec_to_input": centred, "normalize_activations": normalisation,
              "k": K, "rescale_acts_by_decoder_norm": by_norm, "metadata": {"hook_name": "blocks.1.hook_resid_pre"}}  # fmt: skip
    if "transcoder" in kind:
        config["metadata"] |= {"hook_name": "blocks.1.hook_mlp_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    ours = load_dictionary(stored(tmp_path / "sae", config, w))
    x = torch.randn(7, D)
    features, out = saelens(kind, w, x, centred, normalisation, by_norm)
    assert torch.allclose(ours.encode(x), features, atol=1e-4) and torch.allclose(ours.decode(ours.encode(x), x), out, atol=1e-4)
    assert 0 < (features > 0).float().mean() < 1
    assert (ours.hook, ours.hook_out)[0] != (ours.hook, ours.hook_out)[1] or "transcoder" not in kind
    if kind != "gated":
        save_dictionary(ours, tmp_path / "again")
        again = load_dictionary(tmp_path / "again")
        assert torch.equal(again.decode(again.encode(x), x), ours.decode(ours.encode(x), x)) and again.hook_out == ours.hook_out


def test_folders_of_before_saelens_6_and_of_sparsify(tmp_path):
    w, x = weights_of("topk"), torch.randn(7, D)
    old = {"d_in": D, "d_sae": N, "hook_name": "blocks.0.hook_resid_pre", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    ours = load_dictionary(stored(tmp_path / "old", old, w))
    assert torch.allclose(ours.encode(x), saelens("topk", w, x, True, "none", False)[0], atol=1e-4)
    theirs = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    eleuther = stored(tmp_path / "sparsify", {"d_in": D, "k": K, "activation": "topk", "transcode": False}, theirs, "sae.safetensors")
    with pytest.raises(ValueError, match="pass hook="):
        load_dictionary(eleuther)
    assert torch.equal(load_dictionary(eleuther, "blocks.0.hook_resid_pre").encode(x), ours.encode(x))


def test_folders_that_are_refused(tmp_path):
    good = {"architecture": "standard", "metadata": {"hook_name": "h"}}
    w = weights_of("standard")
    cases = {
        "matching_pursuit": (good | {"architecture": "matching_pursuit"}, w, "of kind 'matching_pursuit'"),
        "scaled": (good | {"normalize_activations": "expected_average_only_in"}, w, "expected_average_only_in"),
        "head": (good | {"metadata": {"hook_name": "h", "hook_head_index": 3}}, w, "one head: 3"),
        "lacks": (good, {k: v for k, v in w.items() if k != "W_dec"}, "lack W_dec"),
        "more": (good, w | {"W_temporal": torch.ones(2)}, "W_temporal"),
        "shape": (good, w | {"b_enc": torch.ones(3)}, "expected b_enc"),
        "nan": (good, w | {"b_dec": torch.full((D,), float("nan"))}, "not finite"),
        "k": (good | {"architecture": "topk", "k": 99}, w, "k must be in"),
    }
    for name, (config, weights, message) in cases.items():
        with pytest.raises(ValueError, match=message):
            load_dictionary(stored(tmp_path / name, config, weights))
    with pytest.raises(ValueError, match="Gemma Scope"):
        load_dictionary(tmp_path)
    (tmp_path / "nan" / "cfg.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_dictionary(tmp_path / "nan")


# ---- in the model -------------------------------------------------------------------------------


@torch.no_grad()
def test_splices_and_edits_by_hand(model):
    inputs = model.encode(model.to_inputs("is it red?", images=[picture(96, 64, 1)]))
    d_model, d_z = model.cfg.d_model, model.cfg.n_heads * model.cfg.d_head
    plain = model(inputs)
    greedy = {"max_new_tokens": 2, "do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    for hook, width in (("blocks.1.hook_resid_pre", d_model), ("blocks.0.attn.hook_z", d_z), ("blocks.2.hook_mlp_out", d_model)):
        d = random_dictionary(hook, width, activation="topk", k=K)
        assert torch.equal(model.run_with_hooks(inputs, fwd_hooks=splice(d)), plain)
        rebuilt = model.run_with_hooks(inputs, fwd_hooks=splice(d, error=False))

        def by_hand(x, hook, d=d):
            flat = x.flatten(2)
            return d.decode(d.encode(flat), flat).reshape(x.shape)

        assert torch.allclose(rebuilt, model.run_with_hooks(inputs, fwd_hooks=[(hook, by_hand)]), atol=SAME)
        features = feature_activations(model, inputs, d)[0]
        most = int(features[-1].argmax())

        def without(x, hook, d=d, features=features, most=most):
            return (x.flatten(2) - features[None, :, most, None] * d.W_dec[most]).reshape(x.shape)

        ours = model.run_with_hooks(inputs, fwd_hooks=ablate_features(d, [most]))
        assert torch.allclose(ours, model.run_with_hooks(inputs, fwd_hooks=[(hook, without)]), atol=SAME)
        assert (ours - plain)[0, -1].abs().max() > 1e-4
        held = [
            model.generate(inputs, fwd_hooks=set_features(d, {most: 3.0}), use_past_kv_cache=cached, **greedy) for cached in (True, False)
        ]
        assert torch.equal(*held)
        at_image = model.run_with_hooks(inputs, fwd_hooks=ablate_features(d, [most], positions="question", inputs=inputs))
        first = int(inputs.positions("question")[0])
        assert torch.equal(at_image[:, :first], plain[:, :first]) and not torch.equal(at_image[:, first:], plain[:, first:])
    maps = feature_maps(model, inputs, d, [0, most])
    found = feature_activations(model, inputs, d)[0, inputs.positions("image")]
    assert torch.equal(maps[most].flatten(), found[:, most]) and tuple(maps[0].shape) == inputs.grid()


@torch.no_grad()
def test_a_transcoder_in_the_model(model):
    inputs = model.encode(model.to_inputs("is it red?", images=[picture(96, 64, 1)]))
    d = random_dictionary("blocks.1.ln2.hook_normalized", model.cfg.d_model, hook_out="blocks.1.hook_mlp_out", centred=False)
    assert torch.equal(model.run_with_hooks(inputs, fwd_hooks=splice(d)), model(inputs))
    _, cache = model.run_with_cache(inputs)
    x = cache["blocks.1.ln2.hook_normalized"]
    expected = model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.hook_mlp_out", lambda out, hook: d.decode(d.encode(x), x))])
    assert torch.allclose(model.run_with_hooks(inputs, fwd_hooks=splice(d, error=False)), expected, atol=SAME)


def test_attribution_is_exact_at_the_output_and_a_gradient_inside(model):
    inputs = model.encode(model.to_inputs("is it red?", images=[picture(96, 64, 1)]))
    last = model.cfg.n_layers - 1
    d = random_dictionary(f"blocks.{last}.hook_resid_post", model.cfg.d_model, activation="topk", k=K)
    shares, parts = attribute_features(model, inputs, d, 7, 9)
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs)
        expected = float(logits[0, -1, 7] - logits[0, -1, 9])
        normed = model.ln_final.w * (model.W_U[:, 7] - model.W_U[:, 9]) / cache["ln_final.hook_scale"][0, -1]
        features = feature_activations(model, inputs, d)[0]
    assert abs(parts["logit"] - expected) < 1e-4 and abs(parts["features"] + parts["error"] - parts["logit"]) < 1e-4
    assert torch.allclose(shares[-1], features[-1] * (d.W_dec @ normed), atol=1e-4) and shares[:-1].abs().max() == 0
    inside = random_dictionary("blocks.1.hook_resid_pre", model.cfg.d_model)
    shares, _ = attribute_features(model, inputs, inside, 7)
    feature = int(shares[-1].abs().argmax())
    step = 1e-2

    @torch.no_grad()
    def logit(change):
        def edit(features):
            features[:, -1, feature] *= 1 + change
            return features

        frozen = [("ln_final.hook_scale", lambda scale, hook: model_scale)]
        return float(model.run_with_hooks(inputs, fwd_hooks=[*splice(inside, edit), *frozen])[0, -1, 7])

    with torch.no_grad():
        model_scale = model.run_with_cache(inputs, names_filter="ln_final.hook_scale")[1]["ln_final.hook_scale"]
    slope = (logit(step) - logit(-step)) / (2 * step)
    assert abs(slope - float(shares[-1, feature])) < 0.02 * max(0.1, abs(slope))


def test_top_activating(model):
    data = [Example(str(n), "is it?", "red", (picture(96, 64, n),)) for n in range(3)]
    d = random_dictionary("blocks.1.hook_resid_pre", model.cfg.d_model)
    table = top_activating(model, data, d, [3, 8], top=2, progress=False)
    for feature in (3, 8):
        inputs = [model.to_inputs(e.question, images=list(e.images)) for e in data]
        most = sorted((float(feature_activations(model, x, d)[0, x.positions("image"), feature].max()) for x in inputs), reverse=True)[:2]
        ours = table[table["feature"] == feature]["activation"].tolist()
        assert ours == pytest.approx([value for value in most if value > 0], abs=1e-5)
    with pytest.raises(ValueError, match="exactly one image"):
        top_activating(model, [], d, progress=False)


def test_planted_features_are_learnt(tmp_path):
    torch.manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(20, 16), dim=1)

    def batches(n):
        for _ in range(n):
            active = torch.rand(256, 20) < 0.1
            yield (active * (1 + torch.rand(256, 20))) @ truth

    d, log = train_dictionary(batches(500), "blocks.0.hook_resid_pre", 40, 4, lr=4e-3, seed=5, progress=False)
    similar = (d.W_dec @ truth.T).max(0).values
    assert (similar > 0.9).float().mean() > 0.8 and log["unexplained"].iloc[-1] < 0.1 < log["unexplained"].iloc[0]
    untrained, _ = train_dictionary(batches(1), "blocks.0.hook_resid_pre", 40, 4, seed=5, progress=False)
    assert ((untrained.W_dec @ truth.T).max(0).values > 0.9).float().mean() < 0.5
    d.save(tmp_path / "d.safetensors")
    assert torch.equal(Dictionary.load(tmp_path / "d.safetensors").W_dec, d.W_dec)
    with pytest.raises(ValueError, match="k must be in"):
        train_dictionary(batches(1), "h", 4, 5)
    with pytest.raises(ValueError, match="no activations"):
        train_dictionary([], "h", 4, 2)
