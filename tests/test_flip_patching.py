"""Flip patching: the attribution is exact, the ablations are what they say."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch
from conftest import picture
from tiny import tiny_hf

from analyses.flip_patching import Component, FlipTest, ablate_flip, ablation_hooks, attribute_flip, component_effects
from analyses.flip_patching import _random_like as random_like
from analyses.logit_lens import residual_stack
from hooked_qwen2vl import HookedQwen2VL

EXACT = 1e-5  # logits; measured 1e-6
GAINED, LOST = 5, 9


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=["raw", "processed"])
def model(request, processor):
    model = HookedQwen2VL.from_hf(tiny_hf(), processor)
    if request.param == "processed":
        model.process_weights()
    return model


@pytest.fixture(scope="module")
def prompts(model):
    return [model.encode(model.to_inputs("is it red?", images=[picture(84, 56, seed)])) for seed in (1, 2)]


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_the_attribution_is_exact(model, prompts, layer):
    inputs = prompts[0]
    stack, _ = residual_stack(model, inputs)
    lens = model.unembed(model.ln_final(stack[:, 0]))
    for position in ("last", 3):
        flip = attribute_flip(model, inputs, layer, GAINED, LOST, position)
        differences = lens[:, flip.position, GAINED] - lens[:, flip.position, LOST]
        assert abs(flip.after - differences[layer]) < EXACT and abs(flip.before - differences[layer - 1]) < EXACT
        assert abs(flip.total - (flip.after - flip.before)) < EXACT
        assert abs(flip.total - flip.norm - (flip.after - flip.before)) > 100 * EXACT  # the rescaling matters here
    assert flip.block == layer - 1 and len(flip.heads) == model.cfg.n_heads


def test_a_head_is_its_own_result(model, prompts):
    flip = attribute_flip(model, prompts[0], 2, GAINED, LOST)
    names = ["blocks.1.attn.hook_result", "blocks.1.hook_resid_post"]
    _, cache = model.run_with_cache(prompts[0], names_filter=names)
    result, post = (cache[name][0, flip.position] for name in names)
    scale = (post.pow(2).mean() + model.ln_final.eps).sqrt()
    direction = model.ln_final.w * (model.W_U[:, GAINED] - model.W_U[:, LOST])
    assert torch.allclose(flip.heads, result @ direction / scale, atol=EXACT)


@pytest.mark.parametrize("component", [Component(1, 2), Component(1, None)])
def test_ablation_and_patching_are_by_hand_what_they_are(model, prompts, component):
    clean, other = prompts
    flip = attribute_flip(model, clean, 2, GAINED, LOST)
    table = component_effects(model, clean, flip, other).set_index("component")
    place = flip.position
    name = "blocks.1.attn.hook_result" if component.head is not None else "blocks.1.hook_mlp_out"
    source = model.run_with_cache(other, names_filter=name)[1][name]

    def run(value):
        def put(activation, hook):
            where = (0, place) if component.head is None else (0, place, component.head)
            activation[where] = value[where] if value is not None else 0.0
            return activation

        logits = model.run_with_hooks(clean, fwd_hooks=[(name, put)])
        return float(logits[0, place, GAINED] - logits[0, place, LOST])

    logits = model(clean)
    base = float(logits[0, place, GAINED] - logits[0, place, LOST])
    assert abs(table.loc[str(component), "ablated"] - (run(None) - base)) < 1e-4
    assert abs(table.loc[str(component), "patched"] - (run(source) - base)) < 1e-4
    assert abs(run(None) - base) > 1e-3 and abs(run(source) - base) > 1e-3


def test_the_ranking_is_tested(model, prompts):
    inputs = prompts[0]
    stack, _ = residual_stack(model, inputs)
    differences = model.unembed(model.ln_final(stack[:, 0]))[:, -1]
    gained, lost = int((differences[2] - differences[1]).argmax()), int((differences[2] - differences[1]).argmin())
    flip = attribute_flip(model, inputs, 2, gained, lost)
    test = ablate_flip(model, inputs, flip, n_components=2, n_random=6)
    assert test.components == tuple(c for c, value in flip.ranked()[:2] if value > 0)
    assert abs(test.lens_difference - flip.after) < 1e-4
    assert test.random.shape == (6, 2) and test.removed == (test.ablated[0] <= 0)
    again = ablate_flip(model, inputs, flip, n_components=2, n_random=6)
    assert torch.equal(test.random, again.random)
    assert test.ablated[0] < test.lens_difference
    hooks = ablation_hooks([Component(1, None)], flip.position)
    without = model.run_with_hooks(inputs, fwd_hooks=hooks, stop_at_layer=2)[0, flip.position]
    by_hand = (
        stack[2, 0, flip.position]
        - model.run_with_cache(inputs, names_filter="blocks.1.hook_mlp_out")[1]["blocks.1.hook_mlp_out"][0, flip.position]
    )
    assert torch.allclose(without, by_hand, atol=1e-5)


def test_half_precision_is_read_as_the_lens_reads_it(processor):
    """In bfloat16 a product with W_U in the model's own dtype would round the difference."""
    model = HookedQwen2VL.from_hf(tiny_hf(dtype=torch.bfloat16), processor)
    inputs = model.encode(model.to_inputs("is it red?", images=[picture(84, 56, 1)]))
    stream = residual_stack(model, inputs)[0][2, :, -1:].bfloat16()
    normed = model.ln_final(stream)[0, 0]
    lens = normed.double() @ model.W_U.double()
    rough = model.unembed(model.ln_final(stream))[0, 0].double()
    gained, lost = map(int, ((lens - rough).argmax(), (lens - rough).argmin()))
    found = ablate_flip(model, inputs, attribute_flip(model, inputs, 2, gained, lost), n_random=1).lens_difference
    assert abs(found - float(lens[gained] - lens[lost])) < EXACT < abs(float(rough[gained] - rough[lost]) - found)


def test_an_entry_no_block_made(model, prompts):
    with pytest.raises(ValueError, match="made by a block"):
        attribute_flip(model, prompts[0], 0, GAINED, LOST)


def test_its_picture_has_every_part(model, prompts, tmp_path):
    flip = attribute_flip(model, prompts[0], 2, GAINED, LOST)
    axes = flip.plot(tmp_path / "flip.png").axes[0]
    assert [bar.get_width() for bar in axes.patches] == flip.to_dataframe()["attribution"].tolist()
    assert [label.get_text() for label in axes.get_yticklabels()] == flip.to_dataframe()["component"].tolist()
    assert (tmp_path / "flip.png").stat().st_size > 0


def test_a_row_of_a_batch_is_itself(model, prompts):
    """Whatever is asked of row 1 is what that prompt gives alone; the rows are of different length."""
    questions, seeds = ["is the thing in it red?", "is it?"], (1, 2)
    batch, other = (model.to_inputs(questions, images=[[picture(84, 56, s)], [picture(84, 56, s + 4)]]) for s in seeds)
    alone, other_alone = (model.to_inputs(questions[1], images=[picture(84, 56, s + 4)]) for s in seeds)
    ours, theirs = (attribute_flip(model, x, 2, GAINED, LOST, row=row) for x, row in ((batch, 1), (alone, 0)))
    assert torch.allclose(ours.heads, theirs.heads, atol=EXACT) and abs(ours.after - theirs.after) < EXACT
    tables = component_effects(model, batch, ours, other), component_effects(model, alone, theirs, other_alone)
    for column in ("ablated", "patched"):
        assert abs(tables[0][column] - tables[1][column]).max() < EXACT
        assert abs(tables[0][column]).max() > 100 * EXACT
    tests = ablate_flip(model, batch, ours), ablate_flip(model, alone, theirs)
    assert abs(torch.tensor(tests[0].ablated) - torch.tensor(tests[1].ablated)).max() < EXACT
    assert (tests[0].random - tests[1].random).abs().max() < EXACT


def test_controls_come_from_every_block_up_to_the_flips(model):
    """As many heads and MLPs as were found, none of them, from blocks 0 to that of the flip."""
    found = [Component(2, 0), Component(2, 3), Component(2, None)]
    draws = [random_like(model, found, 2, Random(seed)) for seed in range(60)]
    for draw in draws:
        assert [c.head is None for c in draw] == [False, False, True] and not set(draw) & set(found) and len(set(draw)) == 3
    assert {c.layer for draw in draws for c in draw if c.head is not None} == {0, 1, 2}
    assert {c.layer for draw in draws for c in draw if c.head is None} == {0, 1}  # that of block 2 was found
    assert {c.layer for seed in range(60) for c in random_like(model, found[:1], 0, Random(seed))} == {0}


def test_what_a_test_says(model, prompts):
    """Removed, reversed, and their shares by random draws, from numbers written here; the ranking from largest to smallest."""
    flip = attribute_flip(model, prompts[0], 2, GAINED, LOST)
    flip = replace(flip, heads=torch.tensor([0.25, -3.0, 2.0, 0.5]), mlp=0.75)
    assert [value for _, value in flip.ranked()] == [2.0, 0.75, 0.5, 0.25, -3.0]
    assert [str(component) for component, _ in flip.ranked()] == ["L1H2", "L1MLP", "L1H3", "L1H0", "L1H1"]
    table = flip.to_dataframe()
    assert table["attribution"].tolist() == [2.0, 0.75, 0.5, 0.25, -3.0, flip.bias, flip.norm] and (table["layer"] == 2).all()
    random = torch.tensor([[-1.0, 2.0], [0.0, -2.0], [1.0, 0.5], [3.0, 1.0], [2.0, 4.0]])
    for ablated, final, removed, turned, by_random in (
        ((-0.5, 3.0), 2.0, True, False, 0.2),
        ((0.0, -3.0), 2.0, True, True, 0.2),
        ((0.5, -3.0), -2.0, False, False, 0.8),
        ((1.0, 0.25), -2.0, False, True, 0.8),
    ):
        test = FlipTest(flip, (Component(1, 2), Component(1, None)), 1.5, final, ablated, random)
        assert (test.removed, test.reversed) == (removed, turned)
        assert test.removed_by_random == pytest.approx(0.4) and test.reversed_by_random == pytest.approx(by_random)
        assert test.summary() == {
            "layer": 2, "lost": flip.lost, "gained": flip.gained, "change": flip.after - flip.before,
            "attribution_error": abs(flip.total - (flip.after - flip.before)), "components": "L1H2 L1MLP", "lens_difference": 1.5,
            "lens_difference_ablated": ablated[0], "final_difference": final, "final_difference_ablated": ablated[1],
            "removed": removed, "removed_by_random": pytest.approx(0.4), "reversed": turned, "reversed_by_random": pytest.approx(by_random),
        }  # fmt: skip
