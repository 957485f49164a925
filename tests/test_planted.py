"""Planted mechanisms do what they say, leave the model as it was, and the methods' recovery is counted right."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import Ridge

from analyses.experiments import planted as experiment
from hooked_qwen2vl.scenes import sample
from hooked_qwen2vl.scenes.planted import Planted, color_in, color_prior, copying_head, domain_neurons
from hooked_qwen2vl.scenes.planted import _discriminant as discriminant
from hooked_qwen2vl.scenes.scene import typical_color


def firing(model, planted, items):
    """[neuron] share of the questions at whose last position each planted neuron fires."""
    inputs = model.encode(model.to_inputs([i.question for i in items], images=[[i.image] for i in items]))
    names = sorted({f"blocks.{layer}.mlp.hook_pre" for layer, _ in planted.neurons})
    _, cache = model.run_with_cache(inputs, names_filter=names)
    return torch.stack([(cache[f"blocks.{l}.mlp.hook_pre"][:, -1, n] > 0).float().mean() for l, n in planted.neurons])


@pytest.mark.slow
@torch.no_grad()
def test_domain_neurons_fire_on_their_domain_and_are_gone_afterwards(scenes):
    before = {name: weight.clone() for name, weight in scenes.named_parameters()}
    planted = domain_neurons(scenes, "charts", seed=1, n=3, n_items=150)
    assert len(set(planted.neurons)) == 3 and len({layer for layer, _ in planted.neurons} & {2, 3, 4, 5}) == 1
    own, others = sample(24, seed=9, domain="charts"), [i for i in sample(30, seed=9) if i.domain != "charts"]
    with planted.in_model(scenes):
        assert firing(scenes, planted, own).min() > 0.6 > 0.25 > firing(scenes, planted, others).max()
        changed = [name for name, weight in scenes.named_parameters() if not torch.equal(weight, before[name])]
        assert set(changed) == set(planted.weights)
    with planted.at(0.5).in_model(scenes):
        for layer, neuron in planted.neurons:  # half of what it writes at full strength; its gate as planted
            mlp, full = scenes.blocks[layer].mlp, {n: w[2] for n, w in planted.weights.items() if n.startswith(f"blocks.{layer}.")}
            assert torch.allclose(mlp.W_out[neuron], full[f"blocks.{layer}.mlp.down_proj.weight"][:, neuron] / 2)
            assert torch.equal(mlp.W_gate[:, neuron], full[f"blocks.{layer}.mlp.gate_proj.weight"][neuron])
    assert all(torch.equal(weight, before[name]) for name, weight in scenes.named_parameters())
    with pytest.raises(ValueError, match=r"in 0..1"):
        planted.at(1.5)
    with pytest.raises(ValueError, match="expected a domain of"):
        domain_neurons(scenes, "people")


@pytest.mark.slow
@torch.no_grad()
def test_the_prior_writes_the_typical_color(scenes):
    planted = color_prior(scenes, seed=2, n_items=150)
    asked = [i for i in sample(120, seed=9, domain="shapes", category="attribute") if i.question.startswith("What color is the ")]
    other = [i for i in asked if not i.typical][:12]
    inputs = scenes.encode(scenes.to_inputs([i.question for i in other], images=[[i.image] for i in other]))
    typical = [scenes.tokenizer(typical_color(i.question.rstrip("?").split()[-1]))["input_ids"][0] for i in other]
    said = {}
    for strength in (0.0, 1.0):
        with planted.at(strength).in_model(scenes):
            said[strength] = scenes(inputs, logits_at=-1)[:, -1].argmax(-1)
    shares = {strength: float((tokens == torch.tensor(typical)).float().mean()) for strength, tokens in said.items()}
    assert shares[0.0] < 0.2 and shares[1.0] > 0.5


@pytest.mark.slow
def test_a_planted_head_copies_and_is_found(scenes):
    weights = {name: weight.clone() for name, weight in scenes.named_parameters()}
    planted = copying_head(scenes, seed=0, steps=60, n_items=160)
    assert all(torch.equal(weight, weights[name]) for name, weight in scenes.named_parameters())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in scenes.parameters())
    rows = list(experiment._head_that_copies(scenes, planted, 16))
    assert [row["recovered"] for kind, row in rows if kind == "found"] == [1.0, 1.0]
    before, after = (row["copied"] for kind, row in rows if kind == "behavior" and row["questions"] == "a colour in the question")
    assert before == 0.0 and after > 0.2


@torch.no_grad()
def test_a_mechanism_stays_in_its_own_model(model):
    weight = model.blocks[0].mlp.up_proj.weight
    planted = Planted("color prior", ((0, 1),), (), (), 1.0, {"blocks.0.mlp.up_proj.weight": (weight + 1, weight + 1, weight + 2)})
    before = weight.clone()
    with pytest.raises(ValueError, match="other weights at blocks.0.mlp.up_proj.weight"), planted.in_model(model):
        pass
    assert torch.equal(weight, before)


def test_a_gate_is_scikit_learns_ridge_and_needs_both_kinds_of_positions():
    generator = torch.Generator().manual_seed(0)
    no, yes = torch.randn(80, 6, generator=generator), torch.randn(20, 6, generator=generator) + torch.tensor([3.0, 0, 0, 0, 0, 0])
    gate = discriminant(yes, no)
    x, y, weight = torch.cat((yes, no)).double(), [1.0] * 20 + [-1.0] * 80, [1 / 20] * 20 + [1 / 80] * 80
    penalty = 1e-2 * float((x.square() * torch.tensor(weight)[:, None]).sum(0).mean())
    theirs = torch.tensor(Ridge(penalty, fit_intercept=False).fit(x.numpy(), y, sample_weight=weight).coef_)
    assert torch.allclose(gate.double(), 4 * theirs / (yes.double() @ theirs).mean(), atol=1e-5)
    with pytest.raises(ValueError, match="0 positions where a neuron should fire and 80"):
        discriminant(yes[:0], no)
    with pytest.raises(ValueError, match="does not differ"):
        discriminant(torch.zeros(5, 6), no)


def test_recovery_is_counted_beside_chance():
    planted, chosen = torch.zeros(2, 50, dtype=torch.bool), torch.zeros(2, 50, dtype=torch.bool)
    planted[0, :4] = chosen[0, 2:12] = True
    found = experiment._recovered(planted, chosen)
    assert found["planted"] == 4 and found["chosen"] == 10 and found["recovered"] == 0.5
    assert found["random"] == pytest.approx(0.1, abs=0.02) and found["random_high"] == 0.5
    values = torch.tensor([[1.0, 5.0], [3.0, -2.0]])
    assert experiment._largest(values, 2).tolist() == [[False, True], [True, False]]


def test_which_color_a_question_names():
    items = sample(40, seed=1, domain="shapes", category="existence")
    named = [color_in(item) for item in items]
    assert all(name is None or name in item.question for name, item in zip(named, items)) and any(named)
