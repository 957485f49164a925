"""TransformerLens's side and the analyses on Qwen2.5-VL and Qwen3-VL: decompositions, sweeps, hooks, processing, export."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import picture
from test_patching import LOOPS, difference
from tiny import real_rows, reference_logits, tiny_hf, tiny_processor, tiny_processor3
from transformer_lens.model_bridge import TransformerBridge

from analyses.contextual_lens import contextual_score
from analyses.data.examples import Example, examples
from analyses.domain_neurons import SITES, FiringCounter, count_firings, disable_neurons
from analyses.edge_attribution import edge_attribution
from analyses.experiments.compare import ask, compare_models
from analyses.experiments.max_activating import top_images
from analyses.experiments.neurons import ablation_effects
from analyses.explorer import explore
from analyses.flip_patching import attribute_flip
from analyses.knockout import attention_knockout
from analyses.logit_lens import logit_lens, residual_stack
from analyses.patching import patch_sweep
from analyses.trajectory import answer_ids, answer_trajectory
from hooked_qwen2vl import HookedQwen2VL, Inputs
from hooked_qwen2vl.image_embeddings import ImageEmbeddingsCache

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
SUM = 1e-5  # of the sum's spread
SAME = 1e-5  # measured 2e-6
FRAMES = [picture(56, 28, 10 + i) for i in range(4)]


def hooked(family: str, **config) -> HookedQwen2VL:
    return HookedQwen2VL.from_hf(tiny_hf(family=family, **config), tiny_processor3() if family == "qwen3_vl" else tiny_processor())


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return hooked(request.param)


@pytest.fixture(scope="module")
def qwen3():
    return hooked("qwen3_vl")


def short(model: HookedQwen2VL, seed: int) -> Inputs:
    """An image of two windows that do not divide it, and a word."""
    return model.to_inputs("red", images=[picture(96, 64, seed)], template=False)


@pytest.fixture(scope="module")
def pair(model):
    return short(model, 1), short(model, 2)


# ---- components ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("processed", [False, True])
def test_components_sum_to_the_stream_and_to_the_logits(model, processed):
    model = hooked(model.cfg.vision.tower)
    batch = model.to_inputs(["red?", "and now?"], images=[[picture(96, 64)], []], videos=[[], [FRAMES]], fps=2)
    before = model(batch).log_softmax(-1)
    if processed:
        model.process_weights()
    logits, cache = model.run_with_cache(batch)
    torch.testing.assert_close(real_rows(logits.log_softmax(-1), batch), real_rows(before, batch), rtol=0, atol=1e-4)
    final = cache["resid_post", -1]

    def same(ours, theirs):
        ours, theirs = real_rows(ours, batch), real_rows(theirs, batch)
        assert (ours - theirs).abs().max() < SUM * theirs.std()

    for layer in range(1, model.cfg.n_layers):
        same(cache.decompose_resid(layer).sum(0), cache["resid_pre", layer])
        same(cache.decompose_resid(layer, mlp_input=True).sum(0), cache["resid_mid", layer])
    stack, labels = cache.decompose_resid(return_labels=True)
    mergers = len(model.cfg.vision.deepstack_layers)
    assert len(labels) == len(stack) == len(set(labels)) and sum("deepstack" in label for label in labels) == mergers
    same(stack.sum(0), final)
    same(cache.accumulated_resid(layer=2)[-1], cache["resid_pre", 2])
    same(cache.decompose_resid(apply_ln=True).sum(0) @ model.W_U, logits)
    full, labels = cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True)
    assert len(labels) == len(full) and sum("deepstack" in label for label in labels) == mergers
    same(full.sum(0), final)
    same(cache.get_full_resid_decomposition().sum(0), final)
    projected = cache.get_full_resid_decomposition(apply_ln=True, project_output_onto=model.W_U[:, 5])
    same(projected.sum(0), logits[..., 5])
    same(cache.logit_attrs(full, tokens=5).sum(0), logits[..., 5])
    at_image = cache.decompose_resid(pos_slice=(0, 3)).sum(0)
    torch.testing.assert_close(at_image, final[:, :3], rtol=0, atol=1e-4)


def test_without_deepstack_the_components_do_not_sum(qwen3):
    _, cache = qwen3.run_with_cache(short(qwen3, 1))
    stack, labels = cache.decompose_resid(return_labels=True)
    rest = torch.stack([part for part, label in zip(stack, labels) if "deepstack" not in label])
    assert (rest.sum(0) - cache["resid_post", -1]).abs().max() > 0.1


def test_deepstack_adds_at_the_images_positions_after_its_block(qwen3):
    inputs = short(qwen3, 1)
    _, cache = qwen3.run_with_cache(inputs, vision=True)
    image = inputs.resolve("image")
    for k in range(2):
        added = cache[f"blocks.{k}.hook_deepstack"][0]
        torch.testing.assert_close(cache["resid_pre", k + 1][0] - cache["resid_post", k][0], added, rtol=0, atol=1e-5)
        torch.testing.assert_close(added[image], cache.vision[f"vision_projector.deepstack.{k}.hook_out"][0])
        added[image] = 0
        assert not added.any()
    assert "blocks.2.hook_deepstack" not in qwen3.hook_dict


# ---- running from a layer, encoded images, decoding ---------------------------------------------------


def test_encoded_images_and_later_starts_keep_deepstack(model, pair):
    inputs = pair[0]
    expected = model(inputs)
    encoded = model.encode(inputs)
    kept = ImageEmbeddingsCache(model)
    torch.testing.assert_close(model(encoded), expected, rtol=0, atol=1e-5)
    twice = Inputs.stack([inputs, pair[1]], model.cfg, 0)
    torch.testing.assert_close(model(kept(twice))[:1], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(model(model.encode(twice)[[1, 0]])[1:], expected, rtol=0, atol=1e-4)
    for prompts in (inputs, encoded):
        for layer in range(model.cfg.n_layers):
            stream = model(prompts, stop_at_layer=layer)
            torch.testing.assert_close(model(stream, inputs=prompts, start_at_layer=layer), expected, rtol=0, atol=1e-5)


def test_hooks_on_what_is_encoded_run_no_tower(qwen3, monkeypatch):
    inputs = qwen3.encode(short(qwen3, 1))
    before = qwen3(inputs)
    monkeypatch.setattr(type(qwen3), "run_tower", None)  # it would fail
    after = qwen3.run_with_hooks(inputs, fwd_hooks=[("vision_projector.deepstack.1.hook_out", lambda x, hook: x * 0)])
    assert (after - before).abs().max() > 1e-3


def test_every_hook_is_live(model, pair):
    """What a hook returns is what runs: at every hook of tower, projector and decoder, of one block for all."""
    inputs = pair[0]
    with torch.no_grad():
        expected = model(inputs)
        _, cache = model.run_with_cache(inputs, names_filter=lambda name: True)
        for name in model.hook_dict:
            assert name in cache, name
            if re.search(r"blocks\.[1-9]", name):
                continue

            def change(x, hook):
                return x.flip(-1) if hook.name.endswith("hook_pattern") else x + torch.randn_like(x) if x.is_floating_point() else x

            changed = model.run_with_hooks(inputs, fwd_hooks=[(name, change)])
            assert (changed - expected).abs().max() > 1e-6, name


def test_running_with_a_cache_changes_nothing_and_positions_are_cut_where_they_are(model, pair):
    inputs = pair[0]
    logits, cache = model.run_with_cache(inputs, names_filter=lambda name: True)
    torch.testing.assert_close(logits, model(inputs), rtol=0, atol=1e-4)
    _, cut = model.run_with_cache(inputs, names_filter=lambda name: not name.startswith("vision"), pos_slice=-1)
    for name, value in cut.items():
        whole = cache[name]
        axis = -2 if name.endswith(("hook_pattern", "attn_scores", "_normed")) or "_norm." in name else 1
        torch.testing.assert_close(value.flatten(), whole.narrow(axis, whole.shape[axis] - 1, 1).flatten())


def test_activations_of_generated_tokens(model, pair):
    inputs = pair[0]
    settings = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False, "return_type": "inputs", "verbose": False}
    names = lambda name: name.startswith("blocks.")  # noqa: E731
    done, grown = model.generate(inputs, return_cache=True, names_filter=names, **settings)
    _, whole = model.run_with_cache(done, names_filter=names)
    for name in whole:
        if not name.endswith("attn_scores"):
            torch.testing.assert_close(grown[name], whole[name], rtol=0, atol=1e-4, msg=name)


# ---- methods ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["resid_pre", "v", "pattern"])
def test_a_sweep_of_the_decoder_equals_the_plain_loop(model, pair, activation):
    clean, corrupted = pair
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        theirs = LOOPS[activation](model, corrupted, cache, lambda logits: difference(logits)[0])
    ours = patch_sweep(model, clean, corrupted, difference, activation, batch_size=7, progress=False)
    ours = ours.values[..., 0]
    ours = ours.transpose(1, 2) if activation == "pattern" else ours  # the loop has heads first there
    torch.testing.assert_close(ours.reshape(theirs.shape), theirs, rtol=0, atol=SAME)


@pytest.mark.parametrize("activation", ["resid_post", "z"])
def test_a_sweep_of_the_tower_equals_a_run_with_a_hook(model, pair, activation):
    clean, corrupted = pair
    name = "vision_encoder.blocks.{}." + ("attn.hook_z" if activation == "z" else "hook_resid_post")
    layers = range(model.cfg.vision.n_layers)
    with torch.no_grad():
        _, cache = model.run_with_cache(clean, vision=True)
        tokens = clean.resolve("image")
        ours = patch_sweep(
            model, clean, corrupted, difference, f"vision_encoder.{activation}", positions=tokens.tolist(), batch_size=4, progress=False
        )
        places = clean.unpack_image(torch.arange(clean.visuals[0].n_patches))  # where in the tower each patch of the grid lies
        for layer in layers:
            for number in (0, 1, len(tokens) - 1):
                row, col = divmod(number, clean.grid()[1])
                patches = places[2 * row : 2 * row + 2, 2 * col : 2 * col + 2].flatten()
                head = 1 if activation == "z" else slice(None)

                def put(x, hook, patches=patches, head=head):
                    x[0, patches, head] = cache.vision[hook.name][0, patches, head]
                    return x

                logits = model.run_with_hooks(corrupted, fwd_hooks=[(name.format(layer), put)])
                cell = ours.values[layer, number, 1, 0] if activation == "z" else ours.values[layer, number, 0]
                torch.testing.assert_close(cell, difference(logits)[0], rtol=0, atol=SAME)


def test_with_mergers_the_identities_of_patching_begin_after_them(qwen3):
    clean, corrupted = short(qwen3, 1), short(qwen3, 2)
    with torch.no_grad():
        ours = patch_sweep(qwen3, clean, corrupted, difference, "resid_pre", positions=[slice(None)], progress=False)
        ends = [difference(qwen3(x))[0] for x in (clean, corrupted)]
    recovered = ((ours.values[..., 0] - ends[1]) / (ends[0] - ends[1])).flatten()
    assert (recovered[2:] - 1).abs().max() < 1e-4 and (recovered[:2] - 1).abs().min() > 1e-3


def test_edges_out_of_the_embedding_and_deepstack_sum_to_the_metric(qwen3):
    model = hooked("qwen3_vl").double()
    clean, corrupted = short(model, 1), short(model, 2)
    result = edge_attribution(model, clean, corrupted, lambda logits: difference(logits)[0], ig_steps=40, progress=False)
    given = [n for n, writer in enumerate(result.writers) if writer == "embed" or writer.startswith("DeepStack")]
    direct = result.scores[given].sum()
    with torch.no_grad():
        ends = [difference(model(x))[0] for x in (clean, corrupted)]
    assert abs(direct - (ends[0] - ends[1])) < 0.02 * abs(ends[0] - ends[1])
    for writer in given[1:]:  # what a merger adds after block k is first read by the heads of block k + 1
        block = int("".join(filter(str.isdigit, result.writers[writer])))
        readers = [reader for reader, edge in zip(result.readers, result.edges[writer]) if edge]
        assert readers[0] == f"L{block + 1}H0.q", (result.writers[writer], readers[:2])


def test_neurons_of_every_half_are_counted(model, pair):
    counter = FiringCounter(model)
    counter.add(model, pair[0], ["a"])
    fired = counter.result("tiny").fired
    _, cache = model.run_with_cache(pair[0], vision=True)
    mergers = len(model.cfg.vision.deepstack_layers)
    assert set(fired) == set(SITES) - ({"deepstack"} if not mergers else set())
    for module in fired:
        for layer in range(mergers if module == "deepstack" else 1):
            expected = (cache[f"{SITES[module].format(layer)}.hook_pre"] > 0).sum((0, 1))
            assert torch.equal(fired[module][0, ..., layer, :].sum(0), expected), module


def asked(seeds=(1, 2, 3, 1)) -> list[Example]:
    """Questions of two domains about images of two grids, one image twice."""
    return [Example(str(i), "red?", "blue", (picture(96, 64 + 32 * (s % 2), s),), "ab"[i % 2]) for i, s in enumerate(seeds)]


def test_neurons_of_the_mergers(qwen3):
    """Counted over a data set as one by one; first-order effects as by finite differences; switched off as with W_out's row at 0."""
    model, data = hooked("qwen3_vl").double(), asked()
    counts = count_firings(model, data, batch_size=3, progress=False)
    by_hand = FiringCounter(model, ["deepstack"])
    for example in data:
        by_hand.add(model, model.to_inputs(example.question, images=list(example.images)), [example.domain])
    assert torch.equal(counts.fired["deepstack"], by_hand.result("").fired["deepstack"])
    assert torch.equal(counts.tokens["deepstack"], counts.tokens["projector"])

    effects = ablation_effects(model, data, ["a", "b"], ["deepstack"], batch_size=3)["deepstack"]
    layer, neuron = 1, int(effects[0, 1].abs().argmax())
    inputs = model.to_inputs(
        [e.question for e in data[::2]], images=[list(e.images) for e in data[::2]], answers=[e.answer for e in data[::2]]
    )

    def loss(scale: float) -> float:
        def scaled(post, hook):
            return torch.cat((post[..., :neuron], scale * post[..., neuron : neuron + 1], post[..., neuron + 1 :]), -1)

        with torch.no_grad(), model.hooks(fwd_hooks=[(f"{SITES['deepstack'].format(layer)}.hook_post", scaled)]):
            return float(model(inputs, return_type="loss", loss_per_token=True).sum()) / 2

    slope = (loss(1 - 1e-4) - loss(1 + 1e-4)) / 2e-4  # the loss goes up where a helping neuron goes down
    assert effects[0, layer, neuron] == pytest.approx(slope, rel=1e-4) and abs(slope) > 1e-5

    with torch.no_grad(), disable_neurons(model, [("deepstack", layer, neuron)]):
        ours = model(inputs)
    before = model(inputs)
    with torch.no_grad():
        model.vision_projector.deepstack[layer].W_out[neuron] = 0
        assert torch.allclose(ours, model(inputs), rtol=0, atol=1e-9) and not torch.allclose(ours, before, rtol=0, atol=1e-6)
    top = top_images(model, ("deepstack", 0, 3), data, n=2)
    assert top.examples[0].activations.shape in {(2, 3), (3, 3)} and top.writes


# ---- weights ------------------------------------------------------------------------------------------


def test_the_text_decoder_elsewhere(model, tmp_path):
    """TransformerLens's bridge of the exported folder, hook by hook."""
    bridge = TransformerBridge.boot_transformers(str(model.export_text_model(tmp_path / "text")), device="cpu", dtype=torch.float32)
    tokens = model.to_tokens("the red thing is blue, or red")
    names = [f"blocks.{l}.{hook}" for l in range(model.cfg.n_layers) for hook in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")]
    if model.cfg.text.qk_norm:
        names += [f"blocks.{l}.attn.{hook}" for l in range(2) for hook in ("hook_q", "hook_q_normed", "hook_k_normed")]
        names += [f"blocks.1.attn.{part}_norm.hook_{hook}" for part in "qk" for hook in ("in", "scale", "normalized", "out")]
    logits, ours = model.run_with_cache(tokens, names_filter=names)
    with torch.no_grad():
        expected, theirs = bridge.run_with_cache(tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name].view_as(ours[name]), rtol=1e-4, atol=1e-4, msg=name)


def test_normalised_queries_have_no_qk_matrix(qwen3):
    for read in (lambda: qwen3.QK, lambda: qwen3.all_composition_scores("Q"), lambda: qwen3.all_composition_scores("K")):
        with pytest.raises(ValueError, match="normalises every query and key"):
            read()
    assert qwen3.OV.shape[1] == qwen3.all_composition_scores("V").scores.shape[1] == qwen3.cfg.n_heads
    assert not qwen3.b_Q.any()


@torch.no_grad()
def test_flips_are_attributed_where_blocks_make_them(qwen3):
    """The parts sum to the lens's change at every layer of a text position; where DeepStack adds, an image's position is refused."""
    inputs = short(qwen3, 1)
    stack, _ = residual_stack(qwen3, inputs)
    lens = qwen3.unembed(qwen3.ln_final(stack[:, 0]))
    merged = len(qwen3.cfg.vision.deepstack_layers)
    image = int(inputs.positions("image")[1])
    for position in (int(inputs.positions("last")[0]), image):
        for layer in range(1, qwen3.cfg.n_layers + 1):
            if position == image and layer <= merged:
                with pytest.raises(ValueError, match="to which DeepStack adds"):
                    attribute_flip(qwen3, inputs, layer, 5, 9, position)
                continue
            flip = attribute_flip(qwen3, inputs, layer, 5, 9, position)
            differences = lens[:, position, 5] - lens[:, position, 9]
            assert abs(flip.after - float(differences[layer])) < 1e-5 and abs(flip.before - float(differences[layer - 1])) < 1e-5
            assert abs(flip.total - (flip.after - flip.before)) < 1e-5


# ---- readings and interventions: against the streams as transformers has them, or by hand ----------------------------------


@pytest.fixture(scope="module")
def answered(model):
    return model.to_inputs("is it red?", images=[picture(96, 64, 1)], answers="red blue")


@pytest.fixture(scope="module")
def streams(model, answered):
    """The reference's stream before every block and before the final norm [layer pos d_model], and each layer's logits."""
    hf = tiny_hf(family=model.cfg.vision.tower)
    found, text = [], hf.model.language_model
    for module in (*text.layers, text.norm):
        module.register_forward_pre_hook(
            lambda module, args, kwargs: found.append((args[0] if args else kwargs["hidden_states"])[0]), with_kwargs=True
        )
    with torch.no_grad():
        reference_logits(hf, answered)
        stack = torch.stack(found)
        return stack, hf.lm_head(text.norm(stack))


def test_lens_and_trajectory_read_the_references_streams(model, answered, streams):
    stack, logits = streams
    assert (residual_stack(model, answered)[0][:, 0] - stack).abs().max() < 1e-4 * stack.std()
    lens = logit_lens(model, answered, "image", top_k=3)
    expected = logits[:, list(lens.positions)].log_softmax(-1)
    assert torch.allclose(lens.top_probs, expected.exp().topk(3).values, atol=1e-4)
    last = int(answered.positions("last"))
    found = answer_trajectory(model, model.to_inputs("is it red?", images=[picture(96, 64, 1)]), "red")
    probs = logits[:, last].softmax(-1)
    assert torch.allclose(found.answer_prob, probs[:, list(found.answer_ids)].sum(-1), atol=1e-4)
    assert found.top1.tolist() == probs.argmax(-1).tolist()


def test_the_contextual_lens_compares_the_references_streams(model, answered, streams):
    stack, _ = streams
    depth = model.cfg.n_layers
    for image_layer, text_layer in ((1, depth), (depth, 0)):
        score = contextual_score(model, answered, image_layer=image_layer, text_layer=text_layer)
        word = stack[text_layer, answered.positions("answer")].mean(0)
        cosine = torch.nn.functional.cosine_similarity(word[None], stack[image_layer, answered.positions("image")])
        assert torch.allclose(score.similarity[0].float(), cosine, atol=1e-4) and abs(score.score - cosine.max()) < 1e-4
    assert score.boxes[0, :2].tolist() == [0, 0] and score.boxes[-1, 2:].tolist() == [96, 64]


def test_knockout_is_the_pattern_without_the_image(model, pair):
    inputs = pair[0]
    with torch.no_grad():
        base = model(inputs)[0, -1].softmax(-1)
        answer, image = int(base.argmax()), inputs.positions("image")
        result = attention_knockout(model, inputs, [answer], {"image→last": ("image", "last")}, window=1, progress=False)

        def hide(pattern, hook):
            kept = pattern.clone()
            kept[:, :, -1, image] = 0
            return kept / kept.sum(-1, keepdim=True)

        for layer in range(model.cfg.n_layers):
            new = model.run_with_hooks(inputs, fwd_hooks=[(f"blocks.{layer}.attn.hook_pattern", hide)])[0, -1].softmax(-1)
            assert abs(result.effects[0, layer, 0] - 100 * (new[answer] - base[answer]) / base[answer]) < 1e-2


def test_the_explorer_holds_the_lens_and_the_attention_of_the_run(model, answered):
    page = explore(model, answered, [picture(96, 64, 1)], keep=50)
    stack, _ = residual_stack(model, answered)
    logits = model.unembed(model.ln_final(stack[:, :, page.last]))[:, 0]
    assert torch.allclose(page.kept_probs, logits.softmax(-1)[:, page.kept_ids], atol=1e-5)
    _, cache = model.run_with_cache(answered)
    for layer in range(model.cfg.n_layers):
        assert torch.allclose(page.attention[layer], cache["pattern", layer][0, :, page.last], atol=1e-5)
    assert page.grids == (answered.grid(0, 0),)


def test_a_saved_page_of_every_tower(model, answered, tmp_path):
    explore(model, answered, [picture(96, 64, 1)], keep=50).page(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 10_000


@torch.no_grad()
def test_models_of_the_line_beside_each_other():
    """By relative depth, the same questions: each model's own probabilities at its output, whichever its tower."""
    models = {family: hooked(family) for family in ("qwen2_vl", *FAMILIES)}
    questions = list(examples("scenes", 2))
    table = compare_models(models, questions, ["image"]).to_dataframe()
    assert list(table["model"]) == list(models)
    for name, model in models.items():
        said = []
        for question in questions:
            inputs = ask(model, question.question, question.images)
            ids, _ = answer_ids(model, question.answer, question.candidates)
            said.append(float(model(inputs)[0, -1].softmax(-1)[list(ids)].sum()))
        assert table.set_index("model").loc[name, "answer_prob"] == pytest.approx(sum(said) / len(said), rel=1e-3)
