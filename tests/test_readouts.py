"""The other readouts, each with its identity: embedding lens, contextual neighbours, tuned lens, ProjectAway."""

from __future__ import annotations

import half_characters
import pytest
import torch
from conftest import picture
from tiny import tiny_hf, tiny_processor

from analyses.embedding_lens import contextual_neighbours, embedding_lens, text_bank
from analyses.logit_lens import logit_lens, residual_stack
from analyses.project_away import project_away, project_away_hooks, text_direction
from analyses.tuned_lens import TunedLens, fit_tuned_lens, kl_by_layer
from hooked_qwen2vl import HookedQwen2VL

CLOSE = 1e-5  # float32 by two routes; measured 1e-6


# ---- embedding lens ---------------------------------------------------------------------------------


def test_a_text_token_is_its_own_nearest_embedding(model, batches):
    inputs = batches["image"]
    found = embedding_lens(model, inputs, "question", top_k=2, layers=[0])
    assert found.indices[0, :, 0].tolist() == inputs.tokens[0, list(found.positions)].tolist()
    assert torch.allclose(found.similarity[0, :, 0], torch.ones(len(found.positions)), atol=CLOSE)
    assert (found.similarity[0, :, 1] < 1 - CLOSE).all()
    later = embedding_lens(model, inputs, "question", top_k=1, layers=[3])
    assert later.similarity.max() < 1 - CLOSE


def test_the_embedding_lens_by_hand(model, batches, tmp_path):
    inputs = batches["two images"]
    found = embedding_lens(model, inputs, "image[1]", top_k=3)
    stack, _ = residual_stack(model, inputs)
    with torch.no_grad():
        for layer in range(4):
            h, words = stack[layer, 0, list(found.positions)].double(), model.W_E.double()
            table = (h @ words.T) / h.norm(dim=-1)[:, None] / words.norm(dim=-1)
            assert torch.allclose(found.similarity[layer].double(), table.topk(3).values, atol=CLOSE)
            assert torch.equal(found.indices[layer], table.topk(3).indices)
    assert len(found.to_dataframe()) == 4 * len(found.positions) * 3
    found.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0
    with pytest.raises(ValueError, match="top_k"):
        embedding_lens(model, inputs, top_k=10**6)
    with pytest.raises(ValueError, match="0..3"):
        embedding_lens(model, inputs, layers=[4])


@pytest.mark.parametrize("top_k", [1, 3, 70])
def test_equal_embeddings_come_by_id(top_k):
    """Sixty words with a twin, and thirty-four alike: the lower id first, as a stable sort of the same cosines has it."""
    model = HookedQwen2VL.from_hf(tiny_hf(), tiny_processor())
    with torch.no_grad():
        model.embed.weight[200:260] = model.embed.weight[20:80]
        model.embed.weight[100:134] = model.embed.weight[99]
    inputs = model.to_inputs("what is this?", images=[picture(84, 56)])
    found = embedding_lens(model, inputs, slice(None), top_k=top_k)
    stack, _ = residual_stack(model, inputs)
    unit = [torch.nn.functional.normalize(x, dim=-1) for x in (stack[:, 0], model.W_E.detach())]
    table = (unit[0] @ unit[1].T).clamp(-1.0, 1.0)
    table[..., 200:260], table[..., 100:134] = table[..., 20:80], table[..., 99:100]
    order = table.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    same = (table.gather(-1, order).diff(dim=-1) == 0).any(-1) if top_k > 1 else torch.zeros(0)
    assert torch.equal(found.indices, order) and (top_k == 1 or same.any())


# ---- contextual neighbours --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bank(model):
    return text_bank(model, ["the red thing", "a blue one", "the red car"], progress=False)


def test_a_banks_own_vector_finds_itself(bank):
    similarity, items = bank.nearest(17.0 * bank.vectors, top_k=1)
    assert items[:, 0].tolist() == list(range(len(bank.tokens)))
    assert torch.allclose(similarity, torch.ones_like(similarity), atol=CLOSE)


def test_a_token_of_the_prompt_finds_itself_in_context(model, bank):
    """The sentence as a prompt: every token but the first is nearest to its own place in the bank, at its own layer."""
    sentence = "a blue one"
    found = contextual_neighbours(model, model.to_tokens(sentence), bank, slice(1, None), top_k=1, layers=[1, 3])
    assert torch.allclose(found.similarity, torch.ones_like(found.similarity), atol=CLOSE)
    for i, layer in enumerate(found.layers):
        for j, position in enumerate(found.positions):
            item = int(found.indices[i, j, 0])
            assert (bank.sentences[item], bank.places[item], int(bank.layers[item])) == (sentence, position, layer)
            bare = found.contexts[i][j][0].split(": ", 1)[1]
            assert bare.replace("[", "").replace("]", "") == sentence and f"[{bank.tokens[item]}]" in bare


def test_a_prefix_is_kept_once_and_a_first_token_never(model, bank):
    n_tokens = [model.to_tokens(s).shape[1] for s in ("the red thing", "a blue one", "the red car")]
    shared = 0
    first, last = (model.to_tokens(s)[0].tolist() for s in ("the red thing", "the red car"))
    while first[: shared + 1] == last[: shared + 1]:
        shared += 1
    assert shared >= 2
    assert len(bank.tokens) == 3 * (sum(n_tokens) - 3 - (shared - 1))  # three layers; less first tokens and the prefix
    assert 0 not in bank.places
    with pytest.raises(ValueError, match="two tokens"):
        text_bank(model, ["a"])


def test_a_part_of_a_character_in_context():
    """The whole character is in the brackets, and the sentence is as it was."""
    hard = half_characters.model()
    bank = text_bank(hard, ["a 𪚥 子"], progress=False)
    found = contextual_neighbours(hard, hard.to_tokens("a 𪚥 子"), bank, slice(1, None), top_k=1, layers=[2])
    said = [at[0].split(": ", 1)[1] for at in found.contexts[0]]
    assert said[1:4] == ["a [𪚥] 子"] * 3 and said[-1] == "a 𪚥 [子]"


def test_image_tokens_have_neighbours(model, bank, batches, tmp_path):
    found = contextual_neighbours(model, batches["image"], bank, top_k=4)
    assert found.similarity.shape == (4, len(found.positions), 4) and found.similarity.abs().max() <= 1
    stack, _ = residual_stack(model, batches["image"])
    vectors = torch.nn.functional.normalize(stack[2, 0, list(found.positions)], dim=-1)
    assert torch.allclose(found.similarity[2], (vectors @ bank.vectors.T).topk(4).values, atol=CLOSE)
    found.plot(tmp_path / "a.png")
    other = type(bank)(**{**vars(bank), "model_name": "another"})
    with pytest.raises(ValueError, match="made with another"):
        contextual_neighbours(model, batches["image"], other)


# ---- tuned lens -------------------------------------------------------------------------------------


def test_at_zero_it_is_the_logit_lens_exactly(model, batches):
    inputs = batches["image"]
    lens = TunedLens(model.cfg.n_layers, model.cfg.d_model)
    stack, _ = residual_stack(model, inputs)
    assert torch.equal(lens(stack), stack)
    plain, ours = (logit_lens(model, inputs, "image", translator=t) for t in (None, lens))
    for name in ("top_ids", "top_probs", "entropy", "final_probs", "final_ranks"):
        assert torch.equal(getattr(plain, name), getattr(ours, name))


def test_a_translator_is_read_through_norm_and_unembedding(model, batches):
    lens = TunedLens(model.cfg.n_layers, model.cfg.d_model)
    with torch.no_grad():
        lens.A.normal_(0, 0.1), lens.b.normal_(0, 0.1)
    ours = logit_lens(model, batches["image"], "question", translator=lens)
    stack, _ = residual_stack(model, batches["image"])
    with torch.no_grad():
        for layer in range(4):
            h = stack[layer, 0, list(ours.positions)]
            h = h if layer == 3 else h + torch.einsum("ij,pj->pi", lens.A[layer], h) + lens.b[layer]
            top = model.unembed(model.ln_final(h[None]))[0].softmax(-1).topk(5)
            assert torch.allclose(ours.top_probs[layer], top.values, atol=CLOSE)
    plain = logit_lens(model, batches["image"], "question")
    assert not torch.equal(ours.top_probs[1], plain.top_probs[1]) and torch.equal(ours.top_probs[3], plain.top_probs[3])
    with pytest.raises(ValueError, match="4 layers"):
        lens(stack[:2])


def test_fitting_brings_it_closer_also_on_other_prompts(model, tmp_path):
    prompts = [model.to_inputs("what is red?", images=[picture(84, 84, n)], answers="the blue") for n in range(8)]
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    lens = fit_tuned_lens(model, prompts[:6], steps=80, learning_rate=3e-3, progress=False)
    for held_out in (False, True):
        items = prompts[6:] if held_out else prompts[:6]
        plain, tuned = kl_by_layer(model, items), kl_by_layer(model, items, lens)
        assert (tuned["kl_nats"] < 0.9 * plain["kl_nats"]).all()
    assert len(lens.losses) == 80 and lens.losses[-1] < lens.losses[0]
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) and weight.grad is None
    lens.save(tmp_path / "lens.safetensors")
    again = TunedLens.load(tmp_path / "lens.safetensors")
    assert torch.equal(again.A, lens.A) and torch.equal(again.b, lens.b) and again.model_name == lens.model_name
    with pytest.raises(ValueError, match="at least one prompt"):
        fit_tuned_lens(model, [])
    (tmp_path / "bad").write_bytes(b"no tensors here")
    with pytest.raises(ValueError, match="damaged or another kind of file"):
        TunedLens.load(tmp_path / "bad")


def test_three_steps_of_fitting_by_hand(model, batches):
    """Adam on the mean over layers and positions of KL(p_L ‖ p_l), with gradients of an own, plain computation."""
    inputs, steps, rate = batches["batch"], 3, 2e-3
    lens = fit_tuned_lens(model, [inputs], steps=steps, batch_size=9, learning_rate=rate, seed=4, progress=False)
    stack, _ = residual_stack(model, inputs)
    stack = stack[:, inputs.attention_mask.bool()]
    A = [torch.zeros(model.cfg.d_model, model.cfg.d_model, requires_grad=True) for _ in range(3)]
    b = [torch.zeros(model.cfg.d_model, requires_grad=True) for _ in range(3)]
    adam, generator = torch.optim.Adam([*A, *b]), torch.Generator().manual_seed(4)
    losses = []
    for step in range(steps):
        rows = torch.randint(stack.shape[1], (9,), generator=generator)
        h = [stack[layer, rows] + stack[layer, rows] @ A[layer].T + b[layer] for layer in range(3)]
        p, *q = (model.unembed(model.ln_final(x[None]))[0].log_softmax(-1) for x in (stack[3, rows], *h))
        loss = torch.stack([(p.exp() * (p - each)).sum(-1).mean() for each in q]).mean()
        gradients = torch.autograd.grad(loss, [*A, *b])
        for parameter, gradient in zip([*A, *b], gradients):
            parameter.grad = gradient
        adam.param_groups[0]["lr"] = rate * (1 - step / steps)
        adam.step()
        losses.append(float(loss.detach()))
    assert lens.losses == pytest.approx(losses, rel=1e-5)
    moved = torch.stack(A).detach()
    assert torch.allclose(lens.A, moved, atol=0.02 * rate) and torch.allclose(lens.b, torch.stack(b).detach(), atol=0.02 * rate)
    assert moved.abs().max() > rate and not lens.A.requires_grad


@pytest.mark.parametrize("setting", [torch.no_grad, lambda: torch.set_grad_enabled(False)])
def test_fitting_needs_no_gradients_outside(model, batches, setting):
    expected = fit_tuned_lens(model, [batches["image"]], steps=3, seed=4, progress=False)
    with setting():
        ours = fit_tuned_lens(model, [batches["image"]], steps=3, seed=4, progress=False)
        assert not torch.is_grad_enabled()
    assert torch.equal(ours.A, expected.A) and ours.losses == expected.losses and ours.A.abs().max() > 0


def test_the_kl_of_a_half_precision_model(processor):
    """Read in float32: from exact products of the rounded weights."""
    model = HookedQwen2VL.from_hf(tiny_hf(dtype=torch.bfloat16), processor)
    inputs = model.to_inputs("what is this?")
    stack, _ = residual_stack(model, inputs)
    with torch.no_grad():
        p = [(model.ln_final(h)[0].double() @ model.W_U.double()).log_softmax(-1) for h in stack]
    expected = [float((p[-1].exp() * (p[-1] - q)).sum(-1).mean()) for q in p[:-1]]
    assert kl_by_layer(model, [inputs])["kl_nats"].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_kl_by_hand(model, batches):
    """Padding left out."""
    inputs = batches["batch"]
    stack, _ = residual_stack(model, inputs)
    mask = inputs.attention_mask.bool()
    with torch.no_grad():
        p = [model.unembed(model.ln_final(h))[mask].log_softmax(-1).double() for h in stack]
    expected = [float((p[-1].exp() * (p[-1] - q)).sum(-1).mean()) for q in p[:-1]]
    assert kl_by_layer(model, [inputs])["kl_nats"].tolist() == pytest.approx(expected, rel=1e-4)


# ---- ProjectAway ------------------------------------------------------------------------------------


def test_what_is_projected_away():
    h, t = torch.randn(200, 16), torch.randn(16)
    p = (h @ t) / (t @ t)
    assert 20 < (p > 0).sum() < 180
    ours = project_away(h, t)
    assert (ours[p > 0] @ t).abs().max() < CLOSE and torch.equal(ours[p <= 0], h[p <= 0])
    half = project_away(h, t, alpha=0.5)
    assert torch.allclose((half @ t)[p > 0], 0.5 * (h @ t)[p > 0], atol=CLOSE)
    assert torch.equal(project_away(h, t, alpha=0.0), h)
    assert torch.allclose(project_away(h, 9 * t), ours, atol=CLOSE)  # the direction's length says nothing


def test_half_precision_is_projected_in_float32():
    h, t = (100 * torch.randn(200, 16)).bfloat16(), torch.randn(16).bfloat16()
    ours, wide = project_away(h, t), project_away(h.float(), t.float())
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, wide.bfloat16())
    p = ((h @ t) / (t @ t))[:, None]
    assert not torch.equal(ours, torch.where(p > 0, h - p * t, h))  # in its own precision it would be another


def test_each_entry_has_its_own_direction(model, batches):
    inputs, directions = batches["image"], torch.randn(2, model.cfg.d_model)
    plain, _ = residual_stack(model, inputs)
    with model.hooks(fwd_hooks=project_away_hooks(inputs, directions, [2, 1])):
        ours, _ = residual_stack(model, inputs)
    image = inputs.token_types > 0
    assert torch.allclose(ours[1][image], project_away(plain[1][image], directions[1]), atol=CLOSE)
    assert (ours[2][image] @ directions[0]).max() < 1e-4 < (ours[2][image] @ directions[1]).max()


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_in_the_model(model, batches, layer):
    """Only image tokens, only there; what follows is changed by it, what comes before is not."""
    inputs = batches["batch"]
    t = text_direction(model, "red", layer)
    hooks = project_away_hooks(inputs, t, [layer], n_layers=3)
    plain, _ = residual_stack(model, inputs)
    with model.hooks(fwd_hooks=hooks):
        ours, _ = residual_stack(model, inputs)
    image = inputs.token_types > 0
    positive = (plain[layer] @ t > 0) & image
    assert 0 < positive.sum() < image.sum()
    assert (ours[layer][positive] @ t).abs().max() < 1e-4
    assert torch.equal(ours[layer][~positive], plain[layer][~positive])
    assert torch.equal(ours[:layer], plain[:layer])
    if layer < 3:
        last = inputs.positions("last", 0)
        assert not torch.allclose(ours[3, 0, last], plain[3, 0, last], atol=1e-4)


def test_generation_cached_and_not(model):
    inputs = model.to_inputs("what?", images=[picture(84, 84)])
    hooks = project_away_hooks(inputs, torch.randn(2, model.cfg.d_model) * 3, [0, 1], alpha=2.0)
    settings = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
    cached, plain = (model.generate(inputs, fwd_hooks=hooks, use_past_kv_cache=cache, **settings) for cache in (True, False))
    assert torch.equal(cached, plain)
    assert not torch.equal(cached, model.generate(inputs, **settings))


def test_the_words_direction(model):
    stack, _ = residual_stack(model, model.to_tokens("the red"))
    assert torch.equal(text_direction(model, "the red", 2), stack[2, 0, -1])


def test_edits_that_cannot_be(model, batches):
    t = torch.ones(model.cfg.d_model)
    with pytest.raises(ValueError, match="no row"):
        project_away_hooks(batches["text"], t, [1])
    with pytest.raises(ValueError, match="zero vector"):
        project_away_hooks(batches["image"], 0 * t, [1])
    with pytest.raises(ValueError, match="one for each of 2"):
        project_away_hooks(batches["image"], t.repeat(3, 1), [0, 1])


def test_edits_are_of_their_own_prompt(model):
    """Prompts of the same length whose image has another grid, and shorter ones, are refused: the edits mean other positions."""
    square, wide, short = (model.to_inputs("what?", images=[picture(*size)]) for size in ((112, 84), (84, 112), (56, 56)))
    hooks = project_away_hooks(square, torch.ones(model.cfg.d_model), [1])
    assert not torch.equal(model.run_with_hooks(square, fwd_hooks=hooks), model(square))
    for other in (wide, short):
        with pytest.raises(ValueError, match="these edits were made for a prompt"):
            model.run_with_hooks(other, fwd_hooks=hooks)
