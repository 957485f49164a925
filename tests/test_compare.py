"""Models side by side: what must hold exactly, the reference's own numbers, planted heads, and one model in another."""

from __future__ import annotations

import dataclasses
import json
import math

import pandas as pd
import pytest
import torch
from conftest import picture
from tiny import CHAT_TEMPLATE, randomise, reference_batch, spread, tiny_hf, tiny_tokenizer
from transformer_lens import patching
from transformer_lens.head_detector import detect_head
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from analyses.attention_heads import KINDS, PASSAGE, AttentionHeads, detect_heads
from analyses.data.examples import Example
from analyses.experiments.compare import Comparison, Run, _difference, ask, compare_models, patch_by_depth, text_agreement
from analyses.logit_lens import residual_stack
from analyses.model_patching import patch_between_models
from analyses.patching import patch_sweep
from analyses.trajectory import Trajectories, Trajectory, answer_ids
from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.cli import main
from hooked_qwen2vl.scenes import sample

CLOSE = 1e-5  # float32; measured 2e-6
WORDS = 700  # positions: captions are long in bytes


def shaped_like_gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=290, n_positions=WORDS, n_embd=48, n_layer=4, n_head=3))


def shaped_like_llama():
    numbers = {"vocab_size": 290, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": WORDS}
    return LlamaForCausalLM(LlamaConfig(**numbers, **heads))


def save_text_model(model, folder):
    """A folder as any tool loads it; no chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    randomise(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, model):
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    return {
        "gpt2": save_text_model(shaped_like_gpt2(), root / "gpt2"),
        "llama": save_text_model(shaped_like_llama(), root / "llama"),
        "twin": model.export_text_model(root / "twin"),
    }


@pytest.fixture(scope="module")
def bridges(folders):
    return {name: TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32) for name, folder in folders.items()}


def questions(n=3):
    items = sample(n, seed=3, domain="shapes", category="existence", grid=(4, 5), level=2)
    return [
        Example(str(i), item.question, item.answer, (item.image,), category=item.category, candidates=item.candidates, item=item)
        for i, item in enumerate(items)
    ]


@pytest.fixture(scope="module")
def comparison(model, bridges):
    return compare_models({"qwen2vl": model, **bridges}, questions(), progress=False)


def runs(comparison):
    return {(run.model, run.condition): run for run in comparison.runs}


# ---- side by side -------------------------------------------------------------------------------------


def test_every_model_is_asked_the_same(comparison):
    table = comparison.to_dataframe()
    text = [(name, condition) for name in ("gpt2", "llama", "twin") for condition in ("words", "neither")]
    expected = [("qwen2vl", condition) for condition in ("image", "words", "neither")] + text
    assert list(zip(table["model"], table["condition"])) == expected
    assert (table["items"] == 3).all() and comparison.skipped == 0
    assert table.set_index("model")["layers"].to_dict() == {"qwen2vl": 3, "gpt2": 4, "llama": 2, "twin": 3}


def a_trajectory(ranks, top1, candidates_top, probs) -> Trajectory:
    """Of the answer "red" over 5 layers; what the summary does not use is 0."""
    zeros, shift = torch.zeros(5), {"tv": 0.0}
    return Trajectory(
        "?", "red", (1,), 0, torch.tensor(top1), tuple(map(str, top1)), torch.tensor(probs), torch.tensor(ranks), "blue", zeros, zeros,
        zeros, zeros.long(), ("red", "blue"), torch.tensor(candidates_top), shift, shift, 290, "m"
    )  # fmt: skip


def test_a_run_by_hand():
    items = Trajectories((
        a_trajectory([9, 3, 0, 0, 0], [7, 7, 1, 1, 1], [1, 1, 0, 0, 0], [0.0, 0.1, 0.5, 0.6, 0.8]),
        a_trajectory([9, 9, 2, 1, 1], [7, 5, 5, 4, 3], [0, 0, 1, 1, 1], [0.0, 0.0, 0.1, 0.2, 0.2]),
        a_trajectory([9, 0, 5, 0, 0], [7, 1, 5, 1, 1], [1, 0, 1, 0, 0], [0.0, 0.4, 0.1, 0.6, 0.5]),
    ))  # fmt: skip
    scene = torch.tensor([[1, 0.8, 0.2, 0, 0], [1, 1, 1, 0.6, 0]])
    last = torch.tensor([[0, 0.1, 0.45, 0.9, 1], [0, 0, 0.7, 1, 1]])
    share = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.1], [0.9, 0.8, 0.7, 0.6, 0.2], [0.9, 0.8, 0.7, 0.6, 0.6]])
    run = Run("m", "words", items, share, share / 2, scene, last, torch.tensor([3.0, 1.0]), 4, 5)
    depths, values = run.curve("recovery_scene")  # a pair weighs as much as its gap
    assert depths.tolist() == [0, 0.25, 0.5, 0.75, 1] and values == pytest.approx([1, 0.85, 0.4, 0.15, 0])
    assert run.curve("recovery_last")[1] == pytest.approx([0, 0.075, 0.5125, 0.925, 1])
    assert run.curve("entropy_share")[1] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.3])
    summary = run.summary()
    assert summary["leaves_scene_depth"] == 0.5 and summary["reaches_last_depth"] == 0.5  # unweighted: 0.75 and 0.5
    assert (summary["layers"], summary["items"], summary["pairs"]) == (4, 3, 2)
    assert (summary["pairs_unaligned"], summary["pairs_without_gap"]) == (4, 5)
    expected = {
        "right": 2 / 3, "right_of_candidates": 2 / 3, "answer_prob": 0.5, "ever_first": 2 / 3, "first_depth": 0.375,
        "settled_depth": 0.75, "flips": (1 + 3 + 3) / 3, "final_entropy_share": 0.3,
    }  # fmt: skip
    assert {name: summary[name] for name in expected} == pytest.approx(expected)
    never = dataclasses.replace(run, recovery_scene=torch.ones(2, 5), recovery_last=torch.zeros(2, 5)).summary()
    assert math.isnan(never["leaves_scene_depth"]) and math.isnan(never["reaches_last_depth"])
    none = dataclasses.replace(run, recovery_scene=torch.zeros(0, 5), recovery_last=torch.zeros(0, 5), gap=torch.zeros(0)).summary()
    assert math.isnan(none["leaves_scene_depth"]) and none["pairs"] == 0


def test_the_best_head_and_its_depth_by_hand():
    """The best head, not the block with the best mean; its block lies between two layers."""
    scores = torch.tensor([[0.5, 0.5], [0.1, 0.2], [0.9, 0.0], [0.3, 0.3]])
    kinds = dict.fromkeys(KINDS, scores)
    even_image = dict.fromkeys([*KINDS, "image sink"], 0.02)
    heads = AttentionHeads(kinds, {**kinds, "image sink": scores / 2}, dict.fromkeys(KINDS, 0.05), even_image, "m")
    ones = torch.ones(1, 5)
    items, none = Trajectories((a_trajectory([0] * 5, [1] * 5, [0] * 5, [1.0] * 5),)), torch.zeros(0, 5)
    run = Run("m", "words", items, ones, ones, none, none, torch.zeros(0), 0, 0)
    row = Comparison((run,), {"m": heads}, 0).to_dataframe().iloc[0]
    for kind in KINDS:
        for where, even in (("text", 0.05), ("image", 0.02)):
            label = f"{kind}, {where}"
            assert (row[label], row[f"{label}, depth"], row[f"{label}, even"]) == (pytest.approx(0.9), 2.5 / 4, even)
    assert (row["image sink"], row["image sink, depth"]) == (pytest.approx(0.45), 0.625)


def test_the_final_tokens_probability_at_every_entry(comparison, bridges):
    """That of the token which the last layer puts first, read by hand; not of each layer's own top token."""
    run, differs = runs(comparison)["llama", "words"], False
    bridge = bridges["llama"]
    for number, example in enumerate(questions()):
        tokens = ask(bridge, f"{example.item.caption}\n{example.question}")
        with torch.no_grad():
            stack, _ = residual_stack(bridge, tokens)
            probs = bridge.unembed(bridge.ln_final(stack[:, 0, -1:])).double().softmax(-1)[:, 0]
        final = int(probs[-1].argmax())
        assert torch.allclose(run.final_prob[number].double(), probs[:, final], atol=1e-5)
        differs |= bool((probs.argmax(-1) != final).any())
    assert differs


def test_the_metric_is_the_best_form_of_each_answer(model):
    """max over the answer's first tokens − max over the counterfactual's."""
    example = Example("a", "?", "red", candidates=("red", "blue"))
    other = dataclasses.replace(example, answer="blue")
    ours, theirs = (answer_ids(model, e.answer, e.candidates)[0] for e in (example, other))
    assert len(ours) > 1  # "red", " red", "Red": else a sum would do as well
    logits = torch.randn(model.cfg.d_vocab)
    by_hand = max(logits[i] for i in ours) - max(logits[i] for i in theirs)
    assert _difference(model, example, other)(logits) == by_hand


def test_patching_starts_and_ends_where_it_must(comparison):
    seen = 0
    for run in comparison.runs:
        assert run.condition != "neither" or len(run.gap) + run.unaligned + run.small == 0  # no scene, nothing to patch
        for values, start, end in ((run.recovery_scene, 1.0, 0.0), (run.recovery_last, 0.0, 1.0)):
            seen += len(values)
            assert torch.allclose(values[:, 0], torch.tensor(start), atol=1e-3)
            assert torch.allclose(values[:, -1], torch.tensor(end), atol=1e-3)
    assert seen > 12


def test_figures_are_the_reference_models_own(comparison, folders, bridges):
    """Probability and entropy at the output, from transformers' model and softmax alone."""
    for name in ("gpt2", "llama", "twin"):
        reference = AutoModelForCausalLM.from_pretrained(folders[name]).eval()
        for condition in ("words", "neither"):
            run = runs(comparison)[name, condition]
            for number, example in enumerate(questions()):
                words = f"{example.item.caption}\n" if condition == "words" else ""
                tokens = ask(bridges[name], words + example.question)
                with torch.no_grad():
                    p = reference(tokens).logits[0, -1].double().softmax(-1)
                ids, _ = answer_ids(bridges[name], example.answer, example.candidates)
                assert run.answer_prob[number, -1] == pytest.approx(float(p[ids].sum()), rel=1e-4)
                share = float(-(p * p.log()).sum()) / math.log(len(p))
                assert run.entropy_share[number, -1] == pytest.approx(share, rel=1e-4)
                assert run.final_prob[number, -1] == pytest.approx(float(p.max()), rel=1e-4)


def test_own_form_of_a_prompt(model, bridges):
    """A chat template where there is one: then the twin reads the very tokens that the Qwen2-VL reads."""
    assert torch.equal(ask(bridges["twin"], "is it red?"), ask(model, "is it red?").tokens)
    plain = ask(bridges["gpt2"], "is it red?")
    assert bridges["gpt2"].tokenizer.decode(plain[0]) == "is it red?\nAnswer:"


def test_the_twin_is_the_decoder_in_every_figure(comparison):
    for condition in ("words", "neither"):
        ours, theirs = (runs(comparison)[name, condition] for name in ("qwen2vl", "twin"))
        for measure in ("answer_prob", "entropy_share", "final_prob", "recovery_last", "recovery_scene"):
            one, other = getattr(ours, measure), getattr(theirs, measure)
            assert one.shape == other.shape and torch.allclose(one, other, atol=1e-3)
    for kind, scores in comparison.heads["qwen2vl"].text.items():
        assert torch.allclose(scores, comparison.heads["twin"].text[kind], atol=CLOSE)


def test_curves_are_aligned_by_relative_depth(comparison):
    own, grid = comparison.curves(), comparison.curves(depths=[0, 0.25, 1])
    assert set(grid["depth"]) == {0, 0.25, 1}
    llama = own.query("model == 'llama' and condition == 'words' and measure == 'answer_prob'")["value"].tolist()
    aligned = grid.query("model == 'llama' and condition == 'words' and measure == 'answer_prob'")["value"].tolist()
    assert aligned == pytest.approx([llama[0], (llama[0] + llama[1]) / 2, llama[2]])


def test_tokenizers_that_confuse_answers_leave_the_question_out_for_all(model, bridges):
    confusing = Example("b", "what?", "green", candidates=("green", "gray"))
    both = compare_models({"a": model, "b": bridges["gpt2"]}, [confusing, *questions(1)], ("neither",), progress=False)
    assert both.skipped == 1 and all(len(run.trajectories.items) == 1 for run in both.runs)
    with pytest.raises(ValueError, match="tells apart"):
        compare_models({"a": model}, [confusing], progress=False)


def test_a_scene_that_cannot_be_told_in_words_is_not_patched(model):
    examples = [example for example in questions(6) if example.item.counterfactual]
    told = {example.item.caption for example in examples[:1]} | {example.item.counterfactual.caption for example in examples[:1]}
    originals = {example.item.caption for example in examples}

    def describe(example):
        return example.item.caption if example.item.caption in told | originals else None

    (run,) = compare_models({"a": model}, examples[:2], ("words",), describe, progress=False).runs
    assert len(examples) > 1 and examples[1].item.counterfactual.caption not in told | originals
    assert len(run.trajectories.items) == 2 and len(run.gap) + run.unaligned + run.small == 1


def test_refusals(model, bridges):
    with pytest.raises(ValueError, match="conditions of"):
        compare_models({"a": model}, questions(1), ("sound",))
    with pytest.raises(ValueError, match="has the condition image"):
        compare_models({"gpt2": bridges["gpt2"]}, questions(1), progress=False)
    with pytest.raises(ValueError, match="takes no images"):
        detect_heads(bridges["gpt2"], picture=picture(84, 56))


# ---- patching by depth --------------------------------------------------------------------------------


def test_patching_by_depth_equals_the_sweep_and_transformer_lens(model, bridges):
    def metric(logits):
        return logits[..., 5] - logits[..., 7]

    clean, corrupted = (model.encode(model.to_inputs("is it red?", images=[picture(84, 56, s)])) for s in (1, 2))
    ours, gap = patch_by_depth(model, clean, corrupted, metric, clean.positions("image"))
    sweep = patch_sweep(model, clean, corrupted, lambda l: metric(l[:, -1]), positions=["image"], progress=False)
    with torch.no_grad():
        best, worst = (metric(model(prompt)[0, -1]) for prompt in (clean, corrupted))
    assert torch.allclose(ours[:-1], (sweep.values[:, 0, 0] - worst) / (best - worst), atol=1e-4)
    assert gap == pytest.approx(float(abs(best - worst)))

    gpt2 = bridges["gpt2"]
    clean, corrupted = (ask(gpt2, text) for text in ("is it so, the thing", "is it no, the thong"))
    ours, _ = patch_by_depth(gpt2, clean, corrupted, metric, [-1])
    with torch.no_grad():
        best, cache = gpt2.run_with_cache(clean)
        best, worst = metric(best[0, -1]), metric(gpt2(corrupted)[0, -1])
        theirs = patching.get_act_patch_resid_pre(gpt2, corrupted, cache, lambda l: metric(l[0, -1]))[:, -1]
    assert torch.allclose(ours[:-1], (theirs - worst) / (best - worst), atol=1e-4)


def test_prompts_without_a_gap_have_no_recovery(model):
    prompt = ask(model, "is it red?")
    values, gap = patch_by_depth(model, prompt, prompt, lambda logits: logits[5], [-1])
    assert gap == 0 and values.isnan().all() and values.shape == (model.cfg.n_layers + 1,)


# ---- the twin -----------------------------------------------------------------------------------------


def test_text_decoder_and_twin_agree(model, bridges):
    table = text_agreement(model, bridges["twin"], ["is it red?", PASSAGE], tolerance=CLOSE)
    assert table["ok"].all() and len(table) == 2 * (model.cfg.n_layers + 2)


def test_a_wrong_twin_is_found_at_its_entry(processor, tmp_path):
    changed = HookedQwen2VL.from_hf(tiny_hf(), processor)
    twin = TransformerBridge.boot_transformers(str(changed.export_text_model(tmp_path / "t")), device="cpu")
    with torch.no_grad():
        changed.blocks[1].mlp.down_proj.weight.mul_(1.001)
    table = text_agreement(changed, twin, ["is it red?"])
    assert table[~table["ok"]]["layer_label"].iloc[0] == "2_pre"
    tokens = ask(twin, "is it red?")
    with torch.no_grad():
        ours, theirs = changed(tokens), twin(tokens)
    error = float((ours - theirs).abs().max())
    assert table["error"].iloc[-1] == pytest.approx(error) and error > 0
    assert table["share"].iloc[-1] == pytest.approx(error / float(theirs.std()))


# ---- heads --------------------------------------------------------------------------------------------


def test_text_scores_are_transformer_lenss_over_the_queries_that_have_a_key(model, bridges):
    for one in (model, bridges["gpt2"]):
        ours = detect_heads(one).text
        text = f" {PASSAGE} {PASSAGE}"
        tokens = one.tokenizer(text, return_tensors="pt")["input_ids"]
        for kind, pattern in KINDS.items():
            _, cache = one.run_with_cache(tokens, remove_batch_dim=True)
            theirs = detect_head(one, text, pattern(tokens), cache=cache) if one is model else _detect(one, tokens, pattern)
            queries = int(pattern(tokens).any(-1).sum())
            assert torch.allclose(ours[kind], theirs * tokens.shape[1] / queries, atol=1e-5)


def _detect(bridge, tokens, pattern):
    """Shares by hand: the bridge's to_tokens would put a BOS before GPT-2's text."""
    _, cache = bridge.run_with_cache(tokens)
    attention = torch.stack([cache["pattern", layer][0] for layer in range(bridge.cfg.n_layers)])
    return (attention * pattern(tokens)).sum((-2, -1)) / attention.sum((-2, -1))


def test_planted_heads_are_found(model):
    """An induction head among image tokens, a sink after them, a previous-token head on text: each where it was put."""
    image = picture(84, 56, 3)
    inputs = model.to_inputs("What is this?", images=[image, image])
    first, second = inputs.positions("image[0]"), inputs.positions("image[1]")
    n_text = model.tokenizer(f" {PASSAGE} {PASSAGE}", return_tensors="pt")["input_ids"].shape[1]

    def plant(scores, hook):
        n = scores.shape[-1]
        if n == n_text:
            scores[:, 3, range(1, n), range(n - 1)] += 100
        else:
            scores[:, 1, second[:-1], first[1:]] += 100
            scores[:, 2, int(second[-1]) + 1 :, first[2]] += 100

    plain = detect_heads(model, picture=image)
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_attn_scores", plant)]):
        planted = detect_heads(model, picture=image)
    assert planted.text["previous token"][1, 3] > 0.99 and planted.image["image sink"][1, 2] > 0.99
    assert planted.image["induction"][1, 1] > 0.9
    for kind in ("induction", "image sink"):
        assert torch.equal(planted.image[kind][0], plain.image[kind][0])
    table = planted.to_dataframe()
    assert table.loc[table["induction, image"].idxmax(), ["layer", "head"]].tolist() == [1, 1]
    assert set(planted.sharing()["kind"]) == set(KINDS)


def test_scores_on_the_image_by_hand(model):
    """Attention from the text after two pictures to them, and the token of theirs that gets most of it."""
    image = picture(84, 56, 3)
    heads = detect_heads(model, picture=image)
    inputs = model.to_inputs("What is this?", images=[image, image])
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    seen = inputs.positions("image").tolist()
    after = range(max(seen) + 1, inputs.shape[1])
    for layer in range(model.cfg.n_layers):
        pattern = cache["pattern", layer][0]
        for head in range(model.cfg.n_heads):
            received = [sum(float(pattern[head, q, k]) for q in after) / len(after) for k in seen]
            assert float(heads.image["image attention"][layer, head]) == pytest.approx(sum(received), rel=1e-4)
            assert float(heads.image["image sink"][layer, head]) == pytest.approx(max(received), rel=1e-4)
    even = sum(len(seen) / (q + 1) for q in after) / len(after)
    assert heads.even_image["image attention"] == pytest.approx(even, rel=1e-5)
    assert heads.even_image["image sink"] == pytest.approx(even / len(seen), rel=1e-5)
    n_heads = model.cfg.n_layers * model.cfg.n_heads
    for top in (0.01, 0.3, 1.0):
        assert (heads.sharing(top)["best_heads"] == max(1, round(top * n_heads))).all()


def test_placeholders_are_not_duplicates_of_each_other(model):
    """What detect_head counts on an image prompt as duplicate tokens is any attention between image tokens."""
    inputs = model.to_inputs("What is this?", images=[picture(84, 56, 3)] * 2)
    pairs = int(KINDS["duplicate token"](inputs.tokens).sum())
    n = len(inputs.positions("image"))
    assert pairs >= n * (n - 1) / 2
    heads = detect_heads(model, picture=picture(84, 56, 3))
    assert heads.even_image["duplicate token"] < 1.5 / (n / 2)


def test_even_spread_by_hand(model):
    heads = detect_heads(model, picture=picture(84, 56, 3))
    n = model.tokenizer(f" {PASSAGE} {PASSAGE}", return_tensors="pt")["input_ids"].shape[1]
    assert heads.even_text["previous token"] == pytest.approx(sum(1 / (q + 1) for q in range(1, n)) / (n - 1), rel=1e-5)


# ---- one model in another -----------------------------------------------------------------------------


def tuned_by(processor, alpha):
    """The session's model with a LoRA merged into block 1: attention and MLP."""
    hf = tiny_hf()
    layer = hf.model.language_model.layers[1]
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for linear in (layer.self_attn.q_proj, layer.mlp.down_proj):
            down = torch.randn(2, linear.in_features, generator=generator)
            up = torch.randn(linear.out_features, 2, generator=generator)
            linear.weight.add_(up @ down, alpha=alpha)
    return HookedQwen2VL.from_hf(hf, processor)


@pytest.fixture(scope="module")
def tuned(processor):
    return tuned_by(processor, 0.2)


@pytest.fixture(scope="module")
def shown(model):
    return [model.to_inputs("is it red?", images=[picture(84, 56, 1)]), model.to_inputs("red or blue?")]


def test_everything_behind_the_change_gives_the_sources_logits(model, tuned, shown):
    """The stream after block 1 is all that the change can act through."""
    for source, target in ((model, tuned), (tuned, model)):
        result = patch_between_models(source, target, shown, spans=("all", "image", "last"), progress=False)
        assert result.places[-1] == "blocks.2.hook_resid_post" and result.difference.min() > 0.01
        assert torch.equal(result.explained[2:, 0], torch.ones(2, 2))
        assert (result.explained[:2].nan_to_num() == 0).all()  # before the change the streams are one
        assert torch.equal(result.explained[-1, 2], torch.ones(2))  # the last position after the last block
        assert result.explained[:, 1, 1].isnan().all()  # the text prompt has no image
        assert (result.explained[2, 1, 0] - 1).abs() > 1e-4
        with torch.no_grad():
            name = "blocks.2.hook_resid_pre"
            stream = source.run_with_cache(shown[0], names_filter=name)[1][name]
            logits = target.run_with_hooks(shown[0], fwd_hooks=[(name, lambda x, hook, stream=stream: stream)])
            wanted, plain = source(shown[0]), target(shown[0])
        assert (logits - wanted).abs().max() < CLOSE * spread(wanted) and (plain - wanted).abs().max() > 0.1 * spread(wanted)


@torch.no_grad()
@pytest.mark.parametrize(("alpha", "agreement"), [(0.015, 1.0), (0.2, 0.0)])
def test_every_cell_of_two_models_by_hand(model, processor, shown, alpha, agreement):
    """explained, same_top, the difference and the unpatched agreement, from plain runs with a hook; skipped prompts are counted."""
    tuned = tuned_by(processor, alpha)
    prompts = [shown[0], model.to_inputs("what is blue there?", images=[picture(56, 84, 2)])]
    spans = ("all", "last", [1, 2])
    result = patch_between_models(model, tuned, prompts, "mlp_out", spans, progress=False)
    assert result.explained.shape == (model.cfg.n_layers, 3, len(prompts)) and result.skipped == 0
    for item, prompt in enumerate(prompts):
        wanted, plain = model(prompt)[0, -1].double().log_softmax(-1), tuned(prompt)[0, -1].double().log_softmax(-1)
        gap = float(torch.nn.functional.kl_div(plain, wanted, log_target=True, reduction="sum"))
        assert abs(float(result.difference[item]) - gap) < 1e-5
        assert float(result.top_agrees[item]) == float(int(wanted.argmax()) == int(plain.argmax()))
        for layer in range(model.cfg.n_layers):
            name = f"blocks.{layer}.hook_mlp_out"
            stream = model.run_with_cache(prompt, names_filter=name)[1][name]
            for place, span in enumerate((slice(None), slice(-1, None), [1, 2])):

                def put(x, hook, span=span, stream=stream):
                    x = x.clone()
                    x[:, span] = stream[:, span]
                    return x

                patched = tuned.run_with_hooks(prompt, fwd_hooks=[(name, put)])[0, -1].double().log_softmax(-1)
                left = float(torch.nn.functional.kl_div(patched, wanted, log_target=True, reduction="sum"))
                assert abs(float(result.explained[layer, place, item]) - (1 - left / gap)) < 1e-3
                assert float(result.same_top[layer, place, item]) == float(int(wanted.argmax()) == int(patched.argmax()))
    assert agreement in result.top_agrees and agreement in result.same_top


def test_unpatched_agreement_is_of_the_same_prompts(model, tuned, shown):
    """A span that only some prompts have is compared with those prompts unpatched, not with all."""
    result = patch_between_models(model, tuned, shown, spans=("all", "image"), progress=False)
    result = dataclasses.replace(result, top_agrees=torch.tensor([1.0, 0.0]))
    table = result.to_dataframe().groupby("span")[["same_top_unpatched", "items"]].first()
    assert table.loc["all"].tolist() == [0.5, 2] and table.loc["image"].tolist() == [1.0, 1]


def test_a_fully_tuned_model_and_its_tower(model, processor, shown):
    """Everything but final norm and unembedding differs: the stream after the last block still says it all."""
    hf = tiny_hf(seed=0)
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if "lm_head" not in name and name != "model.language_model.norm.weight":
                weight.mul_(1.02)
    result = patch_between_models(model, HookedQwen2VL.from_hf(hf, processor), shown, spans=("all",), progress=False)
    assert torch.equal(result.explained[-1], torch.ones(1, 2))
    assert (result.explained[0] - 1).abs().min() > 1e-3


def test_a_cell_by_hand_on_transformers_own_models(tuned, model, shown):
    """attn_out of block 1 put in with bare hooks on the reference."""
    result = patch_between_models(model, tuned, shown[:1], "attn_out", ("image",), progress=False)
    batch = reference_batch(shown[0])
    source, target = tiny_hf(), tiny_hf()
    for theirs, ours in zip(target.model.language_model.layers[1].mlp.parameters(), tuned.blocks[1].mlp.parameters()):
        assert theirs.shape == ours.shape
    target.load_state_dict(_state(tuned, target))
    kept, image = {}, shown[0].positions("image")

    def keep(module, args, output):
        kept["out"] = output[0].detach().clone()

    def put(module, args, output):
        changed = output[0].clone()
        changed[:, image] = kept["out"][:, image]
        return (changed, *output[1:])

    with torch.no_grad():
        handle = source.model.language_model.layers[1].self_attn.register_forward_hook(keep)
        wanted = source(**batch).logits[0, -1].double().log_softmax(-1)
        handle.remove()
        plain = target(**batch).logits[0, -1].double().log_softmax(-1)
        target.model.rope_deltas = None
        target.model.language_model.layers[1].self_attn.register_forward_hook(put)
        patched = target(**batch).logits[0, -1].double().log_softmax(-1)
    kl = [(wanted.exp() * (wanted - q)).sum() for q in (patched, plain)]
    assert float(result.explained[1, 0, 0]) == pytest.approx(float(1 - kl[0] / kl[1]), abs=1e-4)


def _state(tuned, hf):
    """The reference's weights with the tuned model's own for block 1."""
    state = hf.state_dict()
    for name, weight in (("self_attn.q_proj", tuned.blocks[1].attn.q_proj), ("mlp.down_proj", tuned.blocks[1].mlp.down_proj)):
        state[f"model.language_model.layers.1.{name}.weight"] = weight.weight.detach()
    return state


def test_models_that_agree_or_do_not_fit_are_refused(model, processor, shown):
    with pytest.raises(ValueError, match="agree"):
        patch_between_models(model, model, shown, progress=False)
    with pytest.raises(ValueError, match="n_layers is 3 and 2"):
        patch_between_models(model, HookedQwen2VL.from_hf(tiny_hf(n_layers=2), processor), shown)
    with pytest.raises(ValueError, match="one row"):
        patch_between_models(model, model, [model.to_inputs(["a", "b"])])
    with pytest.raises(ValueError, match="activation must be"):
        patch_between_models(model, model, shown, "z")


# ---- pictures and the command ---------------------------------------------------------------------------


def test_the_pictures(model, tuned, shown, comparison, tmp_path):
    comparison.plot(tmp_path / "a.png")
    comparison.heads["qwen2vl"].plot(tmp_path / "b.png")
    patch_between_models(model, tuned, shown, progress=False).plot(tmp_path / "c.png")
    assert all((tmp_path / name).stat().st_size > 0 for name in ("a.png", "b.png", "c.png"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tuned):
    root = tmp_path_factory.mktemp("checkpoints")
    changed = tiny_hf()
    changed.load_state_dict(_state(tuned, changed))
    for name, hf in (("base", tiny_hf()), ("tuned", changed)):
        hf.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
        (root / name / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 784, "max_pixels": 28 * 28 * 64}))
        (root / name / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    return root


def test_the_command(checkpoints, folders, tmp_path, capsys):
    picture(84, 56).save(tmp_path / "a.png")
    data = tmp_path / "data.jsonl"
    line = {"image": "a.png", "question": "is it red?", "answer": "yes", "candidates": ["yes", "no"]}
    data.write_text(json.dumps(line) + "\n")
    common = ["compare", "--model", str(checkpoints / "base"), "--data", str(data), "--out", str(tmp_path / "out")]
    assert main(common) == 0
    assert "text decoder and twin agree" in capsys.readouterr().out
    assert main([*common, "--with", f"gpt2={folders['gpt2']}", "--with", f"vl={checkpoints / 'tuned'}"]) == 0
    table = pd.read_csv(tmp_path / "out" / "compare.csv")
    assert list(table["model"].unique()) == [str(checkpoints / "base"), "gpt2", "vl"]
    assert main([*common, "--tuned", str(checkpoints / "tuned")]) == 0
    said = capsys.readouterr().out
    assert "base into tuned" in said and (tmp_path / "out" / "tuned_into_base_mlp_out.csv").exists()
