"""Trajectories: fixtures of the definitions, identities, and the model's own logits."""

from __future__ import annotations

import math
import warnings

import half_characters
import pytest
import torch
from conftest import picture
from tiny import randomise, reference_batch, tiny_hf, tiny_processor
from transformer_lens.model_bridge import TransformerBridge
from transformers import CohereConfig, CohereForCausalLM, GPT2Config, GPT2LMHeadModel

from analyses.answer_scores import SCORES
from analyses.common.vocabulary import logits_of, predictions_of
from analyses.logit_lens import logit_lens, residual_stack
from analyses.trajectory import (
    OUTCOMES,
    Trajectories,
    answer_ids,
    answer_log_probs,
    answer_trajectory,
    doubt_beside_control,
    flips,
    outcome,
    outcomes_by_category,
    same_word,
    shift,
    shift_of_logits,
    stability,
    trajectory_of_logits,
    whole,
)
from hooked_qwen2vl import HookedQwen2VL

FIXTURES = [
    ([3, 5, 7, 5, 7, 7], 7, 2, 4, 4, "wavered"),
    ([7] * 6, 7, 0, 0, 0, "straight"),
    ([1, 2, 7, 3], 7, 2, 3, 3, "held then lost"),
    ([1, 1, 1, 1], 7, None, 0, 0, "settled early"),
    ([1, 2, 1, 3], 7, None, 3, 3, "settled late"),
]


def made(top1, d_vocab=9):
    """Logits whose top-1 sequence is given."""
    logits = torch.randn(len(top1), d_vocab)
    logits[torch.arange(len(top1)), top1] = 5.0
    return logits


@pytest.mark.parametrize("top1, answer, birth, settled, n_flips, kind", FIXTURES)
def test_fixtures(top1, answer, birth, settled, n_flips, kind):
    logits = made(top1)
    item = trajectory_of_logits(logits, logits[-1], [answer], str)
    assert (item.birth(1), item.stability, len(item.flips), item.outcome) == (birth, settled, n_flips, kind)
    assert stability(top1) == settled and len(flips(top1)) == n_flips
    assert item.outcome in OUTCOMES and outcome([t == answer for t in top1], settled) == kind


def test_relations_that_always_hold():
    for seed in range(200):
        torch.manual_seed(seed)
        logits = torch.randn(7, 12).cumsum(0)
        ids = [int(logits[-1].argmax())]
        item = trajectory_of_logits(logits, logits[-1], ids, str)
        assert item.birth(1) <= item.stability <= item.n_layers
        assert (len(item.flips) >= 1) == (item.stability > 0)
        assert item.birth(5) <= item.birth(1)
        assert torch.equal(item.margin > 0, item.answer_rank == 0)
        assert 0 <= item.last_shift["js"] <= math.log(2) and 0 <= item.last_shift["tv"] <= 1
        parts = sum(item.last_shift[f"tv_{part}"] for part in ("form", "function", "content"))
        assert abs(parts - item.last_shift["tv"]) < 1e-5


def test_form_and_content_flips():
    text = {0: "red", 1: " Red", 2: "blue", 3: "the"}.get
    logits = made([0, 1, 2, 0], 4)
    item = trajectory_of_logits(logits, logits[-1], [0], text, candidates=("red", "blue"), candidate_ids=[[0, 1], [2]])
    assert item.flips == [1, 2, 3] and item.content_flips == [2, 3] and item.candidate_flips == [2, 3]
    assert item.eligible_flips == [2, 3]


def test_shift_against_the_definition():
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]])
    figures = shift(probs, probs[-1], str)
    p, q = probs[-1].double(), probs[-2].double()
    assert figures["kl"] == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-6)
    assert figures["tv"] == pytest.approx(0.6, abs=1e-6)
    m = (p + q) / 2
    js = 0.5 * float((p * (p / m).log()).sum() + (q * (q / m).log()).sum())
    assert figures["js"] == pytest.approx(js, abs=1e-6) and figures["argmax_changed"] == 0


def test_the_end_is_the_models_own_prediction(model, batches):
    inputs = batches["batch"]
    with torch.no_grad():
        logits = model(inputs)
    for row in range(4):
        last = int(inputs.positions("last", row)[0])
        item = answer_trajectory(model, inputs, "blue", row=row)
        assert int(item.top1[-1]) == int(logits[row, last].argmax())
        expected = logits[row, last].softmax(-1)[list(item.answer_ids)].sum()
        assert abs(float(item.answer_prob[-1]) - float(expected)) < 1e-5
    assert len(answer_trajectory(model, inputs, "red red", row=2).rest) == len(inputs.positions("answer", 2)) - 1


def test_the_double_norm_is_a_different_prediction(model, batches):
    item = answer_trajectory(model, batches["image"], "red")
    assert item.double_norm_shift["js"] != pytest.approx(item.last_shift["js"], abs=1e-6)


def test_shared_first_tokens_are_dropped_and_counted(model):
    ids, dropped = answer_ids(model, "red", ["red", "blue"])
    assert dropped == 0 and model.to_single_token("red") in ids and model.to_single_token(" red") in ids
    with pytest.raises(ValueError, match="also another candidate's"):
        answer_ids(model, "x", ["x", "x "])


def test_tables_and_pictures(model, batches, tmp_path):
    items = Trajectories(
        tuple(
            answer_trajectory(model, batches[kind], answer, candidates=("red", "blue"), category=kind)
            for kind in ("image", "text")
            for answer in ("red", "blue")
        )
    )
    assert len(items.to_dataframe()) == 4
    assert items.by_category()[list(OUTCOMES)].sum(axis=1).tolist() == [1.0, 1.0]
    items.plot(tmp_path / "all.png"), items.items[0].plot(tmp_path / "one.png")
    assert (tmp_path / "all.png").stat().st_size > 0 and (tmp_path / "one.png").stat().st_size > 0
    assert len(items.items[0].to_dataframe()) == model.cfg.n_layers + 1


# ---- read as the lens reads ---------------------------------------------------------------------------


def float32_logits(model, normalized) -> torch.Tensor:
    """Of half-precision weights, exact products: in float64."""
    return normalized.double() @ model.W_U.double() + model.b_U.double()


def test_half_precision_is_read_in_float32():
    """60,000 words in bfloat16: margins, ranks, entropy and top tokens as products of the rounded weights give them; the
    model's own argmax, which ties in bfloat16, beside them."""
    hf = tiny_hf(d_vocab=60_000, dtype=torch.bfloat16, seed=1)
    model = HookedQwen2VL.from_hf(hf, tiny_processor())
    inputs = model.to_inputs("what is this?", images=[picture(140, 84, 1)])
    with torch.no_grad():
        own_logits, (stack, _) = model(inputs), residual_stack(model, inputs)
        z = torch.stack([float32_logits(model, model.ln_final(h)[0]) for h in stack])  # [layer pos d_vocab]
    ids, _ = answer_ids(model, "red")
    differs = own_logits[0].argmax(-1) != z[-1].argmax(-1)
    assert 0 < differs.sum() < len(differs) / 2
    for at in (*differs.nonzero().flatten().tolist()[:3], 0, 41, inputs.shape[1] - 1):
        item = answer_trajectory(model, inputs, "red", position=at)
        best = z[:, at, ids].amax(-1)
        others = z[:, at].index_fill(-1, torch.tensor(ids), float("-inf")).amax(-1)
        own = z[:, at, int(inputs.tokens[0, at])]
        assert torch.equal(item.answer_rank, (z[:, at] > best[:, None]).sum(-1))
        assert torch.equal(item.input_rank, (z[:, at] > own[:, None]).sum(-1))
        assert torch.equal(item.top1, z[:, at].argmax(-1))
        assert torch.allclose(item.margin.double(), best - others, atol=1e-5)
        p = z[:, at].softmax(-1)
        assert torch.allclose(item.entropy.double(), torch.special.entr(p).sum(-1), atol=1e-5)
        assert torch.allclose(item.answer_prob.double(), p[:, ids].sum(-1), rtol=1e-5)
        theirs = int(own_logits[0, at].argmax())
        assert item.model_top1 == theirs and item.differs_from_model == (theirs != int(z[-1, at].argmax()))
        assert item.to_dataframe()["differs_from_model"].tolist() == [False] * 3 + [item.differs_from_model]
        assert item.summary()["differs_from_model"] == item.differs_from_model
    lens = logit_lens(model, inputs, slice(None))
    assert torch.equal(lens.differs, differs) and lens.n_differs == int(differs.sum())
    assert torch.equal(lens.model_ids, own_logits[0].argmax(-1))
    table = lens.to_dataframe().query("layer == 3 and rank == 1")
    assert table["differs_from_model"].tolist() == differs.tolist()
    assert f"another at {lens.n_differs}" in logit_lens(model, inputs, slice(None)).plot().axes[0].get_xlabel()
    assert logit_lens(model, inputs, slice(None), layers=[0]).n_differs == lens.n_differs  # also where layer L is not asked for


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    """A GPT-2 with biases, in bfloat16: boot(processed) gives it, its norms folded into the weights or not."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    own = half_characters.tokenizer()
    own.chat_template = None
    own.save_pretrained(folder)
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=5000, n_positions=64, n_embd=32, n_layer=3, n_head=2))
    randomise(hf)
    hf.save_pretrained(folder)

    def boot(processed: bool = False, dtype: torch.dtype = torch.bfloat16):
        bridge = TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=dtype)
        if processed:
            bridge.enable_compatibility_mode()
        return bridge

    return boot


@pytest.mark.parametrize("processed, dtype", [(False, torch.bfloat16), (True, torch.float32)])
def test_another_model_is_read_in_float32_with_its_bias(bridge, processed, dtype):
    bridge = bridge(processed, dtype)
    assert bool(bridge.b_U.any()) == processed
    tokens = bridge.to_tokens("the red thing")
    with torch.no_grad():
        own_logits, _ = bridge.run_with_cache(tokens)
        stack, _ = residual_stack(bridge, tokens)
        z = float32_logits(bridge, bridge.ln_final(stack.flatten(0, 1))).unflatten(0, (4, 1))[:, 0]
    lens = logit_lens(bridge, tokens, slice(None), targets=[7])
    ids, _ = answer_ids(bridge, "red")
    for at in range(tokens.shape[1]):
        item = answer_trajectory(bridge, tokens, "red", position=at)
        assert torch.equal(item.top1, z[:, at].argmax(-1)) and torch.equal(lens.top_ids[:, at, 0], item.top1)
        assert torch.equal(item.answer_rank, (z[:, at] > z[:, at, ids].amax(-1)[:, None]).sum(-1))
        assert item.model_top1 == int(own_logits[0, at].argmax()) == int(lens.model_ids[at])
    assert torch.equal(lens.target_ranks[..., 0], (z > z[..., 7:8]).sum(-1))
    assert torch.equal(lens.differs, z[-1].argmax(-1) != own_logits[0].argmax(-1))


def test_what_an_adapter_does_to_logits(tmp_path):
    """Cohere multiplies them."""
    torch.manual_seed(0)
    half_characters.tokenizer().save_pretrained(tmp_path)
    numbers = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    CohereForCausalLM(CohereConfig(**numbers, logit_scale=0.25, tie_word_embeddings=True)).save_pretrained(tmp_path)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), device="cpu", dtype=torch.float32)
    tokens = bridge.to_tokens("the red thing")
    with torch.no_grad():
        log_probs = bridge(tokens)[0, -1].log_softmax(-1)
    lens = logit_lens(bridge, tokens, targets=[5])
    assert float(lens.target_probs[-1, 0, 0]) == pytest.approx(float(log_probs[5].exp()), rel=1e-5)
    item = answer_trajectory(bridge, tokens, "cyan")
    assert float(item.answer_log_prob[-1]) == pytest.approx(float(log_probs[bridge.to_single_token("cyan")]), rel=1e-5)


def test_scores_and_trajectory_are_one_reading():
    """In bfloat16: the answer's log-probability by the scores, by the trajectory and by hand."""
    model = HookedQwen2VL.from_hf(tiny_hf(dtype=torch.bfloat16), tiny_processor())
    image = picture(84, 56)
    inputs = model.to_inputs("what?", images=[image], answers="red 7")
    places = inputs.positions("answer") - 1
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
        z = float32_logits(model, model.ln_final(cache["resid_post", -1])[0, places])
    expected = z.log_softmax(-1).gather(-1, inputs.tokens[0, places + 1][:, None])[:, 0]
    assert SCORES["mean_log_prob"](model, inputs) == pytest.approx(float(expected.mean()), rel=1e-5)
    assert SCORES["probability"](model, inputs) == pytest.approx(float(expected.sum().exp()), rel=1e-4)
    read = predictions_of(model, cache["resid_post", -1][0, places], inputs.tokens[0, places + 1][:, None])
    assert torch.allclose(read.target_log_probs[:, 0].double(), expected, atol=1e-5)
    assert torch.allclose(logits_of(model, cache["resid_post", -1][0, places]).double(), z, atol=1e-5)


def test_the_shift_of_distributions_that_are_far_apart():
    """KL of two that are 500 nats apart: by hand p = (1, e^-500, …) beside the same the other way round."""
    logits = torch.tensor([[0.0, 0.0, 0.0], [500.0, 0.0, -1.0], [0.0, 500.0, -1.0]])
    figures = shift_of_logits(logits, logits[-1], str)
    assert figures["kl"] == pytest.approx(500.0, rel=1e-9)
    assert figures["js"] == pytest.approx(math.log(2), rel=1e-9) and figures["tv"] == pytest.approx(1.0)
    certain = torch.tensor([[0.2, 0.8, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    figures = shift(certain, certain[-1], str)
    assert figures["kl"] == pytest.approx(math.log(2)) and math.isfinite(figures["js"])
    assert shift(certain, certain[1], str)["kl"] == 0.0
    model = HookedQwen2VL.from_hf(tiny_hf())
    with torch.no_grad():
        model.unembed.weight.zero_(), model.ln_final.w.fill_(1.0)
        model.unembed.weight[5, 0] = 50.0
    far = predictions_of(model, torch.eye(model.cfg.d_model)[:1], torch.tensor([[5, 6]]))
    assert float(far.target_log_probs[0, 1]) == pytest.approx(-50 * math.sqrt(model.cfg.d_model), rel=1e-4)
    assert float(far.target_probs[0, 1]) == 0.0


def test_the_steps_that_the_last_one_is_measured_by():
    """js_ratio: over the median, not the mean, of the steps before the last, which is none of them."""
    torch.manual_seed(3)
    logits = torch.randn(7, 5).double() * torch.tensor([[0.1], [4.0], [0.3], [1.0], [9.0], [0.2], [3.0]])
    p = logits.softmax(-1)

    def js(a, b):
        m = (a + b) / 2
        return 0.5 * float((a * (a / m).log()).sum() + (b * (b / m).log()).sum())

    steps = [js(p[l], p[l + 1]) for l in range(5)]
    middle = sorted(steps)[2]
    assert middle != pytest.approx(sum(steps) / 5, rel=0.1) and sorted([*steps, js(p[5], p[6])])[2:4] != [middle, middle]
    item = trajectory_of_logits(logits.float(), None, [1], str)
    assert item.last_shift["js_ratio"] == pytest.approx(js(p[5], p[6]) / middle, rel=1e-5)
    other = torch.randn(5).softmax(0)
    assert shift(p, other, str)["js_ratio"] == pytest.approx(js(p[5], other.double()) / middle, rel=1e-5)
    assert math.isnan(shift(p[:2], p[1], str)["js_ratio"])  # one step alone has no usual one
    still = torch.stack([p[0], p[0], p[0], p[1]])
    assert math.isnan(shift(still, p[1], str)["js_ratio"])


def test_what_moved_by_class():
    """Every token of it: form, function and content by hand over a flat vocabulary of 5,000."""
    names = {0: " red", 1: "Red", 2: "the", 3: "\n", 4: "<|im_end|>", 5: "\ufffd", 6: "", 7: ".", 8: "blue", 9: "\ufffd"}
    text = lambda i: names.get(i, f"word {i}" if i % 2 else ("a", " ...")[i // 2 % 2])  # noqa: E731
    torch.manual_seed(0)
    logits = torch.randn(3, 5000)
    logits[-1, 0] += 9
    figures = shift_of_logits(logits, logits[-1], text)
    p = logits.double().softmax(-1)
    moved = 0.5 * (p[-1] - p[-2]).abs()
    function = {2, 3, 4, 7} | {i for i in range(10, 5000) if i % 2 == 0}
    assert figures["tv_form"] == pytest.approx(float(moved[:2].sum()), abs=2e-6)
    assert figures["tv_function"] == pytest.approx(float(moved[sorted(function)].sum()), abs=2e-6)
    assert figures["tv_content"] == pytest.approx(float(moved.sum() - moved[:2].sum() - moved[sorted(function)].sum()), abs=4e-6)
    logits[-1, 5] += 99  # the final token is half a character: the other half is not another form of it
    p = logits.double().softmax(-1)
    moved = 0.5 * (p[-1] - p[-2]).abs()
    assert shift_of_logits(logits, logits[-1], text)["tv_form"] == pytest.approx(float(moved[5]), abs=2e-6)


# ---- the double norm -------------------------------------------------------------------------------------


def test_the_double_norm_is_what_a_notebook_sees(processor):
    """From transformers' own hidden states, normed by its norm as notebooks do; the same on folded weights."""
    hf = tiny_hf()
    model = HookedQwen2VL.from_hf(hf, processor)
    inputs = model.to_inputs("what is this?", images=[picture(140, 84, 1)])
    with torch.no_grad():
        hidden = hf(**reference_batch(inputs), output_hidden_states=True).hidden_states
        before = hf.lm_head(hf.model.language_model.norm(hidden[-2][0, -1])).double().log_softmax(-1)
        twice = hf.lm_head(hf.model.language_model.norm(hidden[-1][0, -1])).double().log_softmax(-1)
    expected = float((twice.exp() * (twice - before)).sum())
    raw = answer_trajectory(model, inputs, "red")
    assert raw.double_norm_shift["kl"] == pytest.approx(expected, rel=1e-4) and raw.no_double_norm == ""
    assert raw.last_shift["kl"] != pytest.approx(expected, rel=1e-2)
    model.process_weights()
    assert answer_trajectory(model, inputs, "red").double_norm_shift == pytest.approx(raw.double_norm_shift, rel=1e-3, abs=1e-5)
    model.process_weights()  # what has been folded is kept
    again = answer_trajectory(model, inputs, "red")
    assert again.double_norm_shift == pytest.approx(raw.double_norm_shift, rel=1e-3, abs=1e-5)
    assert again.last_shift == pytest.approx(raw.last_shift, rel=1e-3, abs=1e-5)


def test_a_control_that_is_none_is_not_reported(bridge, processor):
    model = HookedQwen2VL.from_hf(tiny_hf(), processor)
    inputs = model.to_inputs("what?")
    model.process_weights()
    del model.ln_final.folded_w
    for item in (answer_trajectory(model, inputs, "red"), answer_trajectory(bridge(True, torch.float32), "the red", "red")):
        assert "folded" in item.no_double_norm and all(math.isnan(v) for v in item.double_norm_shift.values())
        assert item.summary()["no_double_norm"] == item.no_double_norm
        assert math.isnan(item.summary()["double_norm_kl"]) and item.double_norm_shift.keys() == item.last_shift.keys()
    for dtype in (torch.float32, torch.bfloat16):
        item = answer_trajectory(bridge(False, dtype), "the red", "red")
        assert item.no_double_norm == "" and item.double_norm_shift["js"] > 0
        assert item.double_norm_shift["js"] != pytest.approx(item.last_shift["js"], rel=1e-3)


# ---- what an answer is --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hard():
    """A model whose vocabulary has halves of characters."""
    return half_characters.model()


def texts(model, answer, candidates=()):
    return sorted(model.tokenizer.decode([i]) for i in answer_ids(model, answer, candidates)[0])


def test_variants_are_tokens_of_whole_characters(hard):
    assert hard.tokenizer(" 红")["input_ids"][0] == hard.tokenizer(" 猫")["input_ids"][0]  # both begin with ' \xe7'
    assert texts(hard, "红") == ["红"] and texts(hard, "红", ["红", "猫"]) == ["红"]
    assert answer_ids(hard, "红", ["红", "猫"])[1] == 0  # nothing was shared
    assert texts(hard, "7") == ["7"] and texts(hard, "12") == ["1"]  # a space before a digit is a token of its own
    assert texts(hard, "zyzzyva") == ["Z", "zy"] and texts(hard, "cyan") == ["C", "cyan"]
    assert texts(hard, "\n\nred") == [" red", "R", "red"]
    for answer in ("𪚥", "é"):
        with pytest.raises(ValueError, match=f"no form of {answer!r} begins with a token of whole characters"):
            answer_ids(hard, answer)
    for answer in ("", " ", "\n\n"):
        with pytest.raises(ValueError, match="empty"):
            answer_ids(hard, answer)
    with pytest.raises(ValueError, match="no form of '𪚥'"):
        answer_trajectory(hard, "what?", "红", ["红", "𪚥"])


def test_an_id_without_text_is_no_variant(hard):
    assert not whole("") and not whole(" \ufffd") and whole("红") and whole("\n")
    assert hard.tokenizer.decode([hard.cfg.d_vocab - 1]) == ""


def test_parts_of_characters_are_not_one_word(hard):
    assert same_word(" Red", "red") and not same_word("\ufffd", "\ufffd") and not same_word("", "")
    assert same_word(" ", "\n\n") and not same_word("red", "reds")
    text = {0: "\ufffd", 1: "\ufffd", 2: "红", 3: "", 4: "", 5: " 红"}.get
    logits = made([0, 1, 2, 5, 3, 4, 4], 6)
    item = trajectory_of_logits(logits, None, [2], text)
    assert item.flips == [1, 2, 3, 4, 5] and item.content_flips == [1, 2, 4, 5]


def test_an_answer_of_several_tokens_is_named_so(hard, tmp_path):
    inputs = hard.to_inputs("what?", images=[picture(84, 56)])
    with pytest.warns(UserWarning, match="'zyzzyva' is 5 tokens: what is followed is first token Z, zy of zyzzyva"):
        item = answer_trajectory(hard, inputs, "zyzzyva")
    assert item.first_token_only and item.label == "first token Z, zy of zyzzyva"
    assert item.summary()["followed"] == item.label and item.summary()["first_token_only"]
    legend = [text.get_text() for text in item.plot(tmp_path / "a.png").legends[0].get_texts()]
    assert legend[0].startswith("answer: first␣token␣Z,␣zy␣of␣zyz") and any(name.startswith("all of zyzzyva") for name in legend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = answer_trajectory(hard, inputs, "cyan")
    assert one.label == "cyan or first token C" and not one.first_token_only
    assert not any("all of" in text.get_text() for text in one.plot().legends[0].get_texts())
    assert answer_trajectory(hard, inputs, "红").label == "红"
    named = trajectory_of_logits(made([1, 1]), None, [1], str)
    assert named.label == "" and not named.first_token_only and named.answer_log_prob.isnan().all()
    assert math.isnan(named.mean_log_prob)


def by_hand(model, tokens, streams, spelt, at):
    """[layer token] log p of the answer's tokens behind `at`, from the stream of a prompt that holds them."""
    assert tokens[at + 1 : at + 1 + len(spelt)].tolist() == spelt
    with torch.no_grad():
        z = torch.stack([model.unembed(model.ln_final(h[None]))[0] for h in streams])
    log_probs = z.double().log_softmax(-1)
    return torch.stack([log_probs[:, at + n, token] for n, token in enumerate(spelt)], dim=-1)


@pytest.mark.parametrize("answer", ["zyzzyva", " café", "red 7", "cyan"])
def test_the_whole_answer_by_layer(hard, answer):
    """Against a run of the prompt with the answer in it, layer by layer; from prompts with no answer, with another, with it."""
    image = picture(84, 56)
    forced = hard.to_inputs("what?", images=[image], answers=answer)
    spelt = hard.tokenizer(answer, add_special_tokens=False)["input_ids"]
    stack, _ = residual_stack(hard, forced)
    expected = by_hand(hard, forced.tokens[0], stack[:, 0], spelt, int(forced.positions("last")))
    batch = hard.to_inputs(["and what is that?", "what?", "what?"], images=[[image]] * 3, answers=["no", None, "blue or red"])
    for inputs, row in ((hard.to_inputs("what?", images=[image]), 0), (forced, 0), (batch, 1), (batch, 2), (hard.encode(forced), 0)):
        item = answer_trajectory(hard, inputs, answer, row=row)
        assert torch.allclose(item.token_log_probs.double(), expected, atol=1e-4)
        assert torch.allclose(item.answer_log_prob.double(), expected.sum(-1), atol=1e-4)
        assert item.mean_log_prob == pytest.approx(float(expected[-1].mean()), abs=1e-4)
        assert item.rest == pytest.approx(expected[-1, 1:].tolist(), abs=1e-4)
        assert item.to_dataframe()["answer_log_prob"].tolist() == pytest.approx(expected.sum(-1).tolist(), abs=1e-4)
        assert item.summary()["answer_log_prob"] == pytest.approx(float(expected[-1].sum()), abs=1e-4)
        assert torch.allclose(answer_log_probs(hard, inputs, answer, row=row).double(), expected, atol=1e-4)
        once = answer_trajectory(hard, inputs, "cyan", row=row)  # the position itself does not see what stands behind it
        assert torch.allclose(item.entropy, once.entropy, atol=1e-4) and torch.equal(item.top1, once.top1)
        assert torch.equal(item.input_rank, once.input_rank)


def test_the_whole_answer_of_any_spelling(hard):
    """Also where no token of whole characters begins it, in the middle of a prompt, and not among the images."""
    inputs = hard.to_inputs("what is this?", images=[picture(84, 56)])
    spelt = hard.tokenizer("𪚥")["input_ids"]
    forced = hard.to_inputs("what is this?", images=[picture(84, 56)], answers="𪚥")
    stack, _ = residual_stack(hard, forced)
    expected = by_hand(hard, forced.tokens[0], stack[:, 0], spelt, inputs.shape[1] - 1)
    assert torch.allclose(answer_log_probs(hard, inputs, "𪚥").double(), expected, atol=1e-4)
    at = int(inputs.positions("question")[2])
    cut = hard.tokenizer("𪚥")["input_ids"]
    short = answer_log_probs(hard, inputs, "𪚥", at)
    assert short.shape == (4, 3) and not torch.allclose(short.double(), expected, atol=1e-2)
    assert torch.allclose(answer_log_probs(hard, inputs, "𪚥", at - inputs.shape[1]), short, atol=1e-5)
    text = hard.tokenizer.decode(cut)
    assert text == "𪚥"
    image = int(inputs.positions("image")[0])
    assert answer_log_probs(hard, inputs, "𪚥", image).isnan().all()
    assert not answer_log_probs(hard, inputs, "red", image).isnan().any()  # one token needs nothing behind it
    item = answer_trajectory(hard, inputs, "zyzzyva", position=image)
    assert item.answer_log_prob.isnan().all() and not item.answer_prob.isnan().any()
    with pytest.raises(ValueError, match="empty"):
        answer_log_probs(hard, inputs, "")


def test_the_whole_answer_of_a_text_model(hard, bridge):
    bridge = bridge(False, torch.float32)
    for model, prompt in ((bridge, "the red"), (hard, "the red thing")):
        tokens = model.to_tokens(prompt)
        spelt = model.tokenizer("zyzzyva", add_special_tokens=False)["input_ids"]
        forced = torch.cat((tokens, torch.tensor([spelt])), dim=1)
        stack, _ = residual_stack(model, forced)
        expected = by_hand(model, forced[0], stack[:, 0], spelt, tokens.shape[1] - 1)
        for form in (prompt, tokens, [prompt]):
            item = answer_trajectory(model, form, "zyzzyva")
            assert torch.allclose(item.token_log_probs.double(), expected, atol=1e-4)
        earlier = answer_trajectory(model, forced, "zyzzyva", position=tokens.shape[1] - 1)
        assert torch.allclose(earlier.token_log_probs.double(), expected, atol=1e-4)


# ---- flips, outcomes, places ----------------------------------------------------------------------------


def test_the_positions_own_token_is_the_one_that_enters_there(hard):
    inputs = hard.to_inputs("what is this?", images=[picture(84, 56)])
    lens = logit_lens(hard, inputs, slice(None), targets=sorted(set(inputs.tokens[0].tolist())))
    ids = lens.target_ids.tolist()
    for at in (3, inputs.shape[1] - 4, -1):
        item = answer_trajectory(hard, inputs, "cyan", position=at)
        expected = lens.target_ranks[:, at, ids.index(int(inputs.tokens[0, at]))]
        assert torch.equal(item.input_rank, expected)
        assert not torch.equal(item.input_rank, lens.target_ranks[:, at, ids.index(int(inputs.tokens[0, at - 1]))])


def test_settled_at_half_the_depth_is_early():
    assert outcome([False] * 5, 2) == "settled early" and outcome([False] * 5, 3) == "settled late"
    assert outcome([False] * 4, 1) == "settled early" and outcome([False] * 4, 2) == "settled late"
    logits = made([1, 2, 3, 3, 3])
    item = trajectory_of_logits(logits, None, [7], str)
    assert item.stability == 2 and item.outcome == "settled early"


def test_flips_are_eligible_from_the_entry_that_bears_the_answer():
    """B_5 = 2 by hand: the flip there counts, the one before does not, nor one to a word that is no candidate."""
    text = dict(enumerate(["red", "blue", "green", "w", "x", "y", "z", "v"])).get
    logits = torch.zeros(6, 8)
    for layer, order in enumerate(
        ([1, 2, 3, 4, 5, 0], [2, 1, 3, 4, 5, 0], [1, 2, 3, 4, 0, 5], [3, 1, 2, 0, 4, 5], [1, 0, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5])
    ):
        logits[layer, order] = torch.arange(9.0, 3.0, -1.0)
    names = ("red", "blue", "green")
    item = trajectory_of_logits(logits, None, [0], text, answer="red", candidates=names, candidate_ids=[[0], [1], [2]])
    assert item.answer_rank.tolist() == [5, 5, 4, 3, 1, 0] and item.birth(5) == 2 and item.birth(1) == 5
    assert item.content_flips == [1, 2, 3, 4, 5] and item.eligible_flips == [2, 5]
    assert item.stages == ["none", "none", "guess", "guess", "sure", "sure"][:0] or item.stages[:2] == ["none", "none"]
    never = trajectory_of_logits(logits, None, [7], text, candidates=names, candidate_ids=[[0], [1], [2]])
    assert never.birth(5) is None and never.eligible_flips == []


def test_a_tie_goes_to_the_lowest_id():
    """The answer ties at the top with a token before it: it is not the top-1, so nothing was held and nothing is right."""
    logits = torch.tensor([[0.0, 5.0, 1.0, 5.0], [0.0, 5.0, 1.0, 5.0]])
    after, before = (trajectory_of_logits(logits, None, [i], str) for i in (3, 1))
    assert after.top1.tolist() == [1, 1] and not after.right and after.held == [] and after.outcome == "settled early"
    assert before.right and before.held == [0, 1] and before.outcome == "straight"
    assert after.margin.tolist() == before.margin.tolist() == [0, 0]


def test_figures_by_hand():
    """Every figure of the summary and every column of the table, on made logits."""
    torch.manual_seed(1)
    logits = made([1, 2, 7, 2, 3, 3], 9)
    item = trajectory_of_logits(logits, None, [7, 8], str, own=4, answer="7", dropped=2, candidates=("7", "2", "5"),
                                candidate_ids=[[7, 8], [2], [5]], category="c", question="?")  # fmt: skip
    p = logits.double().softmax(-1)
    summary, table = item.summary(), item.to_dataframe()
    assert (summary["layers_held"], summary["lost_at"], summary["flips"], summary["stability"]) == (1, 3, 4, 4)
    assert summary["stability_depth"] == 4 / 5 and summary["birth_1_depth"] == 2 / 5 and summary["birth_sure"] == 2
    assert summary["peak_prob"] == pytest.approx(float(p[:, 7:].sum(-1).max())) and summary["final"] == "3"
    assert summary["final_prob"] == pytest.approx(float(p[-1, 7:].sum())) and summary["ids_shared_with_candidates"] == 2
    assert summary["final_entropy"] == pytest.approx(float(torch.special.entr(p[-1]).sum()))
    assert summary["candidate_flips"] == sum(a != b for a, b in zip(item.candidates_top, item.candidates_top[1:]))
    shares = torch.stack([p[:, 7] + p[:, 8], p[:, 2], p[:, 5]], -1)
    assert torch.equal(item.candidates_top, shares.argmax(-1))
    assert item.rival == "3" and torch.allclose(item.rival_prob.double(), p[:, 3], atol=1e-6)
    assert torch.equal(item.input_rank, (logits > logits[:, 4:5]).sum(-1))
    assert table["entropy_share"].tolist() == pytest.approx((torch.special.entr(p).sum(-1) / math.log(9)).tolist(), rel=1e-5)
    assert table["flip"].tolist() == [False, True, True, True, True, False]
    assert table["layer"].tolist() == [0, 1, 2, 3, 4, 5] and item.n_layers == 5
    assert item.margin.tolist() == pytest.approx((logits[:, 7:].amax(-1) - logits[:, :7].amax(-1)).tolist())
    right = trajectory_of_logits(made([7, 1, 7]), None, [7], str).summary()
    assert right["lost_at"] is None and right["right"] and right["outcome"] == "wavered"
    none = trajectory_of_logits(made([1, 7]), None, [3], str)
    assert none.candidates_top.tolist() == [-1, -1] and none.candidate_flips == [] and none.summary()["birth_1_depth"] is None
    half = torch.tensor([[0.0, -50.0], [0.0, 0.0], [1.0, 0.0]])
    assert trajectory_of_logits(half, None, [1], str).birth_sure == 1  # exactly one half is enough
    assert trajectory_of_logits(half, None, [1], str).stages == ["guess", "sure", "sure"]


# ---- doubt beside its control ----------------------------------------------------------------------------


def one(top1, answer="red", names=("red", "blue", "green", "grey"), question="?", seed=0, category="c", said=None):
    """A trajectory over made logits whose tokens are the candidates, in order, then others."""
    text = [*names, "other"]
    logits = made(top1, len(text))
    ids = [[i] for i in range(len(names))]
    return trajectory_of_logits(logits, None, ids[names.index(answer)], text.__getitem__, answer=answer, candidates=names,
                                candidate_ids=ids, question=question, category=category, seed=seed, model_top1=said)  # fmt: skip


def test_the_control_is_neither_the_answer_nor_what_is_said():
    drawn = {one([0, 1, 1], question=str(q)).control for q in range(60)}
    assert drawn == {"green", "grey"}
    assert {one([0, 1, 0], question=str(q)).control for q in range(60)} == {"blue", "green", "grey"}
    assert {one([0, 1, 4], question=str(q)).control for q in range(60)} == {"blue", "green", "grey"}  # no candidate is said
    assert {one([0, 1, 1], seed=s).control for s in range(60)} == {"green", "grey"}
    assert one([0, 1, 1], question="a").control == one([0, 1, 1], question="a").control
    turned = one([0, 1, 1], names=("red", "blue", "grey", "green"), question="a")
    assert turned.control == one([0, 1, 1], question="a").control  # whatever order they come in
    assert one([0, 1, 1], names=("red", "blue")).control == "" and one([0, 0], names=("red", "blue")).control == "blue"
    text = ["red", "blue", " Blue", "green"]
    item = trajectory_of_logits(made([0, 2], 4), None, [0], text.__getitem__, answer="red", candidates=("red", "blue", "green"),
                                candidate_ids=[[0], [1], [3]])  # fmt: skip
    assert item.control == "green"  # what is said is a form of blue


def test_doubt_beside_its_control_by_hand():
    """Six items; of each the answer is red, and the control is known or drawn from one."""
    three = ("red", "blue", "green")
    items = (
        one([0, 2, 1], names=three, said=1),  # wrong, doubt; the control green was held once
        one([2, 2, 1], names=three),  # wrong, no doubt; green held twice
        one([0, 1, 1], names=three, said=2),  # wrong, doubt; green never held; the model itself says green
        one([0, 0, 0], names=three, said=1),  # right: the control is blue or green, and neither was held
        one([0, 1, 1], names=three[:2]),  # wrong, doubt, no control
        one([2, 2, 1], names=three, category="d"),  # another category
    )
    assert [item.summary()["control_layers_held"] for item in items] == [1, 2, 0, 0, None, 2]
    assert [item.summary()["control"] for item in items[:3]] == ["green"] * 3 and items[4].summary()["control"] == ""
    table = Trajectories(items).by_category()
    assert table.loc["c", "items"] == 5 and table.loc["c", "held then lost"] == pytest.approx(3 / 5)
    assert (table.loc["c", "with_control"], table.loc["c", "wrong_with_control"]) == (4, 3)
    assert (table.loc["c", "doubt"], table.loc["c", "control_doubt"]) == (pytest.approx(2 / 4), pytest.approx(2 / 4))
    assert (table.loc["c", "doubt_if_wrong"], table.loc["c", "control_doubt_if_wrong"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert (table.loc["d", "doubt_if_wrong"], table.loc["d", "control_doubt_if_wrong"]) == (0.0, 1.0)
    assert table["differs_from_model"].tolist() == [2, 0]
    said = one([2, 1, 2], names=three)  # the control blue at the last layer would be what is said: green is said
    assert said.control == "blue" and said.control_held == [1]
    alone = doubt_beside_control(Trajectories(items[4:5]).to_dataframe())
    assert alone["with_control"] == 0 and math.isnan(alone["doubt"]) and math.isnan(alone["control_doubt_if_wrong"])
    old = Trajectories(items).to_dataframe().drop(columns=["control", "control_layers_held", "differs_from_model"])
    assert outcomes_by_category(old)["control_doubt"].isna().all()  # tables of earlier versions have none
