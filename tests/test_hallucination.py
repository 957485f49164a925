"""Hallucination detection: metrics by hand and against scikit-learn, orientation, and runs that are cut short."""

from __future__ import annotations

import dataclasses
import inspect
import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import picture
from sklearn.metrics import average_precision_score, roc_auc_score

from analyses.answer_scores import SCORES, all_scores
from analyses.common.statistics import detection, weighted_figures, within_groups
from analyses.contextual_lens import default_layers
from analyses.data.benchmarks import EXACT, NEEDS_A_JUDGE, OBJECTS, YES_NO, Question
from analyses.experiments.hallucination import (
    ALL,
    CONTROL,
    WITHIN,
    Answer,
    Claim,
    HallucinationExperiment,
    Hallucinations,
    _answer,
    choose_layers,
    claim_inputs,
    claims_of,
    detect_hallucinations,
    generate_answers,
    read_hallucinations,
    read_judgements,
    score_claim,
    with_controls,
)  # fmt: skip
from analyses.runs.engine import describe_model, read_failures, run
from hooked_qwen2vl.cli import main

FAST = ["probability", "contextual", CONTROL]
LIMIT = 3  # tokens of a generated answer


def question(number: int, text: str = "what is it?", answer: str = "red", **more) -> Question:
    values = {"judge": EXACT, "category": "attribute", "images": (picture(56, 84, number),), **more}
    return Question(f"q{number}", text, answer, **values)


@pytest.fixture
def items():
    return [question(n) for n in range(5)]


# ---- metrics ----------------------------------------------------------------------------------------


def tied_scores(n: int = 60, seed: int = 0):
    rng = np.random.default_rng(seed)
    correct = rng.random(n) < 0.7
    return correct, np.round(rng.normal(size=n) + 0.8 * correct, 1)


def test_each_way_in_has_the_same_defaults():
    one, two = (inspect.signature(f).parameters for f in (detect_hallucinations, read_hallucinations))
    assert (one["n_boot"].default, one["seed"].default) == (two["n_boot"].default, two["seed"].default) == (1000, 0)
    ways = (detect_hallucinations, choose_layers, HallucinationExperiment)
    assert [inspect.signature(f).parameters["max_new_tokens"].default for f in ways] == [32] * 3


def test_by_hand():
    correct = np.array([True, True, False, True, False])
    score = np.array([0.9, 0.6, 0.6, 0.3, 0.1])  # pairs: 0.9 wins twice; 0.6 ties, wins; 0.3 loses, wins
    figures = detection(correct, score, n_boot=10)
    assert figures["auroc"] == pytest.approx((2 + 1.5 + 1) / 6)
    assert figures["ap_correct"] == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert figures["ap_hallucinated"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 4)
    assert (figures["items"], figures["hallucinated"], figures["unscored"]) == (5, 2, 0)


def test_points_are_scikit_learns_and_a_turned_score_is_worse():
    correct, score = tied_scores()
    ours = detection(correct, score, n_boot=10)
    assert ours["auroc"] == roc_auc_score(correct, score)
    assert ours["ap_correct"] == average_precision_score(correct, score)
    assert ours["ap_hallucinated"] == average_precision_score(~correct, -score)
    turned = detection(correct, -score, n_boot=10)
    assert turned["auroc"] == pytest.approx(1 - ours["auroc"]) and turned["auroc"] < 0.5 < ours["auroc"]


def test_weighted_figures_are_scikit_learns():
    correct, score = tied_scores()
    weights = np.random.default_rng(1).multinomial(60, np.full(60, 1 / 60), size=8)
    weights[0, ~correct] = 0
    ours = weighted_figures(correct, score, weights)
    assert np.isnan(ours[:, 0]).all()
    for draw, w in enumerate(weights[1:], 1):
        theirs = (
            roc_auc_score(correct, score, sample_weight=w),
            average_precision_score(correct, score, sample_weight=w),
            average_precision_score(~correct, -score, sample_weight=w),
        )
        assert ours[:, draw] == pytest.approx(theirs, abs=1e-12)


def test_intervals_are_percentiles_of_resamples():
    correct, score = tied_scores()
    figures = detection(correct, score, n_boot=300, seed=3, level=0.9)
    rng, values = np.random.default_rng(3), []
    for counts in rng.multinomial(60, np.full(60, 1 / 60), size=300):
        chosen = np.repeat(np.arange(60), counts)  # the resample itself
        values.append(roc_auc_score(correct[chosen], score[chosen]))
    assert (figures["auroc_low"], figures["auroc_high"]) == pytest.approx(tuple(np.percentile(values, (5, 95))))
    assert detection(correct, score, n_boot=300, seed=3, level=0.9) == figures
    assert detection(correct, score, n_boot=300, seed=4, level=0.9)["auroc_low"] != figures["auroc_low"]


def test_one_class_gives_nan_and_counts():
    for correct in (np.ones(4, bool), np.zeros(4, bool), np.ones(0, bool)):
        figures = detection(correct, np.arange(len(correct)), n_boot=5)
        assert (figures["items"], figures["resamples"]) == (len(correct), 0)
        assert all(np.isnan(figures[name]) for name in ("auroc", "auroc_low", "ap_correct", "ap_hallucinated_high"))
    figures = detection(np.array([True, False, True, False]), [1, np.nan, 0.5, 0.7], n_boot=50)
    assert (figures["unscored"], figures["items"]) == (1, 3)
    assert figures["auroc"] == 0.5 and np.isnan(figures["auroc_low"])  # one hallucinated answer: no interval
    assert 0 < figures["resamples"] < 50  # resamples of one class are left out
    with pytest.raises(ValueError, match="one score an answer"):
        detection([True], [1.0, 2.0])
    with pytest.raises(ValueError, match="infinite"):
        detection([True, False], [1.0, np.inf])


def test_within_compares_only_inside_groups():
    rng = np.random.default_rng(0)
    groups = ["easy"] * 60 + ["hard"] * 60
    correct = np.r_[rng.random(60) < 0.9, rng.random(60) < 0.2]
    score = np.r_[rng.random(60) + 1, rng.random(60)]  # tells the groups apart, and nothing inside them
    inside = within_groups(correct, score, groups, n_boot=100)
    wins = [
        (score[i] > score[j]) + 0.5 * (score[i] == score[j])
        for i in range(120) for j in range(120)
        if correct[i] and not correct[j] and groups[i] == groups[j]
    ]  # fmt: skip
    assert inside["auroc"] == pytest.approx(np.mean(wins))
    assert inside["auroc_low"] < 0.5 < inside["auroc_high"] < detection(correct, score, 10)["auroc"]
    assert np.isnan(within_groups([True, True], [1, 2], ["a", "b"])["auroc"])


def test_intervals_within_groups_are_percentiles_of_resamples():
    """All groups resampled together; a draw's groups weigh as many right-hallucinated pairs as they have in it."""
    correct, score = tied_scores()
    b = np.isin(np.arange(60), np.r_[np.nonzero(~correct)[0][:12], np.nonzero(correct)[0][:6]])  # mostly hallucinated
    figures = within_groups(correct, score, np.where(b, "b", "a"), n_boot=200, seed=3)
    aurocs, pairs = np.zeros((2, 200)), np.zeros((2, 200))
    for draw, counts in enumerate(np.random.default_rng(3).multinomial(60, np.full(60, 1 / 60), size=200)):
        for number, here in enumerate((b, ~b)):
            chosen = np.repeat(np.arange(60), counts * here)
            y, s = correct[chosen], score[chosen]
            pairs[number, draw] = y.sum() * (~y).sum()
            aurocs[number, draw] = roc_auc_score(y, s) if pairs[number, draw] else 0
    values = (aurocs * pairs).sum(0) / pairs.sum(0)
    assert (figures["auroc_low"], figures["auroc_high"]) == pytest.approx(tuple(np.percentile(values, (2.5, 97.5))))
    assert figures["resamples"] == 200 and pairs.std(1).min() > 0


def test_two_groups_are_twice_the_data():
    """The interval shrinks by √2, unless the two groups share their clusters."""
    correct, score = tied_scores()
    one = within_groups(correct, score, ["a"] * 60, n_boot=500)
    two = within_groups(np.tile(correct, 2), np.tile(score, 2), ["a"] * 60 + ["b"] * 60, n_boot=500)
    same = within_groups(np.tile(correct, 2), np.tile(score, 2), ["a"] * 60 + ["b"] * 60, n_boot=500, clusters=[*range(60)] * 2)
    widths = [figures["auroc_high"] - figures["auroc_low"] for figures in (one, two, same)]
    assert widths[2] == pytest.approx(widths[0]) and same["clusters"] == 60
    assert two["auroc"] == pytest.approx(one["auroc"]) and widths[1] / widths[0] == pytest.approx(0.5**0.5, abs=0.1)
    assert (two["items"], two["hallucinated"]) == (120, 2 * int((~correct).sum()))
    few = within_groups([True] * 20 + [False] * 4, [*range(20), 3, 4, 5, 6], ["a"] * 12 + ["b"] * 12, n_boot=50)
    assert few["auroc"] == pytest.approx(np.mean([s > f for s in range(12, 20) for f in (3, 4, 5, 6)]))
    assert np.isnan(few["auroc_low"]) and np.isnan(few["auroc_high"])  # four hallucinated answers: a value, no interval


# ---- what is scored ---------------------------------------------------------------------------------


def test_yes_and_no_score_the_noun_with_opposite_signs(model):
    item = question(1, "Is there a red thing?", "yes", judge=YES_NO, noun="red thing")
    claims = claims_of([item] * 2, ["yes", "no"])
    assert [(c.correct, c.said, c.noun) for c in claims] == [(True, "yes", "red thing"), (False, "no", "red thing")]
    yes, no = (score_claim(model, claim, [name for name in SCORES if name != CONTROL]) for claim in claims)
    for name in ("contextual", "internal_confidence"):
        assert yes[name] == pytest.approx(-no[name]) and yes[name] != 0
    assert yes["probability"] > 0 and no["probability"] > 0 and yes["probability"] != no["probability"]
    plain = score_claim(model, Claim("plain", item, "yes", True), ["contextual"])
    assert plain["contextual"] != pytest.approx(yes["contextual"])  # the word "yes" itself is another score


@pytest.mark.parametrize(
    "answer, said", [("Yes.", "yes"), (" no way", "no"), ("NO", "no"), ("There is no dog", ""), ("Yes, but no dog", ""), ("", "")]
)
def test_when_a_noun_is_scored(answer, said):
    (claim,) = claims_of([question(1, "Is there a dog?", "yes", judge=YES_NO, noun="dog")], [answer])
    assert claim.said == said and bool(claim.noun) == bool(said)


def test_orientation_the_model_believes_its_own_answer(model, items):
    answers = [answer.text for answer in generate_answers(model, items, max_new_tokens=1)]
    with torch.no_grad():
        logits = model(model.to_inputs(items[0].question, images=list(items[0].images)))[0, -1]
    least = model.tokenizer.decode([int(logits[:256].argmin())])
    claims = claims_of(items[:1] * 2, [answers[0], least])
    own, other = (score_claim(model, claim, ["probability", "mean_log_prob"]) for claim in claims)
    assert own["probability"] > other["probability"] and own["mean_log_prob"] > other["mean_log_prob"]


def caption_item(**more) -> Question:
    caption = "A dog and a red bus, two dogs, one dog."
    return question(0, "describe", "", judge=OBJECTS, given=caption, truth=("dog",), category="caption", **more)


def test_every_object_of_a_caption_is_a_claim(model):
    item = caption_item()
    (answer,) = generate_answers(model, [item])
    claims = claims_of([item], [answer.text], {"dog": "dog", "bus": "bus"})
    assert [(item.given[slice(*c.mention)], c.correct) for c in claims] == [
        ("dog", True), ("bus", False), ("dogs", True), ("dog", True)
    ]  # fmt: skip
    for claim in claims:
        inputs = claim_inputs(model, claim)
        at = inputs.positions("answer").tolist()
        start, end = claim.mention
        assert model.tokenizer.decode(inputs.tokens[0, at]).strip() == item.given[start:end]
        assert model.tokenizer.decode(inputs.tokens[0, inputs.positions("history")]).strip() == item.given[:start].strip()
        with torch.no_grad():
            log_probs = model(inputs).log_softmax(-1)[0]
        by_hand = log_probs[[p - 1 for p in at], inputs.tokens[0, at]].mean()
        ours = score_claim(model, claim, ["mean_log_prob"])
        assert ours["mean_log_prob"] == pytest.approx(float(by_hand), abs=1e-4)
    puppy = claims_of([dataclasses.replace(item, truth=("Puppy",))], [item.given], {"dog": "dog", "puppy": "dog", "bus": "bus"})
    assert [claim.correct for claim in puppy] == [True, False, True, True]
    with pytest.raises(ValueError, match="vocabulary"):
        claims_of([item], [item.given])


def test_the_control_sees_the_nearest_other_picture():
    shots = [(picture(28, 28, seed),) for seed in (0, 0, 1, 1, 0)]
    items = [question(n, images=shot) for n, shot in enumerate(shots)]
    found = list(with_controls(items))
    assert [item.other for item in found] == [shots[2], shots[2], shots[1], shots[1], shots[3]]
    assert [item.id for item in found] == [item.id for item in items] and found[3].images == shots[3]
    assert [item.other for item in with_controls(items[:2])] == [(), ()]
    assert [item.other for item in with_controls(items[:3])] == [shots[2], shots[2], shots[1]]  # a longer run: the same


def test_the_control_is_the_score_with_the_other_picture(model, items):
    (claim,) = claims_of(items[1:2], ["red"])
    scores = score_claim(model, claim, ["contextual", CONTROL], items[0].images)
    (swapped,) = claims_of([dataclasses.replace(items[1], images=items[0].images)], ["red"])
    expected = score_claim(model, swapped, ["contextual"])["contextual"]
    assert scores[CONTROL] == pytest.approx(expected) and scores["contextual"] != pytest.approx(expected)


def test_what_cannot_be_scored_is_said(model, items, tmp_path):
    empty, red = claims_of(items[:2], ["", "red"])
    assert score_claim(model, empty, FAST) == {**dict.fromkeys(FAST), "refused": "the answer is empty"}
    without = score_claim(model, red, FAST, (tmp_path / "not there.png",))
    assert without[CONTROL] is None and without["contextual"] is not None and without["refused"] == ""
    blind = dataclasses.replace(red, item=dataclasses.replace(items[1], images=()))
    assert "image" in score_claim(model, blind, FAST)["refused"]


# ---- answers ----------------------------------------------------------------------------------------


def test_answers_of_a_batch_are_those_of_each_alone(model, items):
    """Rows end at different steps: what follows an end token is no part of an answer."""
    limits = []
    for limit in (1, 6):
        batch = generate_answers(model, items, limit)
        for item, answer in zip(items, batch):
            inputs = model.to_inputs(item.question, images=list(item.images))
            tokens = model.generate(inputs, max_new_tokens=limit, do_sample=False, return_type="tokens", verbose=False)
            ids = tokens[0, inputs.shape[1] :].tolist()
            ends = [at for at, token in enumerate(ids) if token in model.cfg.special.eos]
            assert answer.cut == (not ends)
            assert answer.text == model.tokenizer.decode(ids[: ends[0]] if ends else ids, skip_special_tokens=True)
        limits.append({answer.cut for answer in batch})
    assert limits[0] == {True}
    end = model.cfg.special.eos[0]
    for ids, cut, text in (([65, end, 70, 70], False, [65]), ([65, 70], True, [65, 70]), ([end, 65], False, [])):
        answer = _answer(model, ids)
        assert answer.cut == cut and answer.text == model.tokenizer.decode(text)
    whole = model.tokenizer("red", add_special_tokens=False)["input_ids"]
    letters = [model.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "red"]
    spaced = "red , blue ."
    assert _answer(model, model.tokenizer(spaced, add_special_tokens=False)["input_ids"]).text == spaced
    assert len(whole) < 3 and [_answer(model, ids) for ids in (whole, letters)] == [("red", True, False), ("red", True, True)]


# ---- runs -------------------------------------------------------------------------------------------

SETTINGS = (FAST, None, LIMIT)  # methods, vocabulary, tokens


def scored(model, items, out, **more):
    small = {"batch_size": 2, "batches_per_shard": 1, "progress": False}
    experiment = HallucinationExperiment(model, *SETTINGS)
    return run("hallucination", lambda: with_controls(items), experiment, out, experiment.settings, model=model, **small, **more)


def test_a_run_gives_what_memory_gives(model, items, tmp_path):
    scored(model, items, tmp_path / "one")
    for k in (1, 0):
        scored(model, items, tmp_path / "two", rank=(k, 2))
    whole = detect_hallucinations(model, items, "mine", FAST, max_new_tokens=LIMIT, progress=False, batch_size=2)
    one, two = (read_hallucinations(tmp_path / name, "mine") for name in ("one", "two"))
    pd.testing.assert_frame_equal(one.claims, whole.claims, check_exact=True)
    pd.testing.assert_frame_equal(two.claims, whole.claims, check_exact=True)
    assert one.weights == whole.weights == describe_model(model)["weights"] and one.methods == tuple(FAST)
    assert one.layers == whole.layers == default_layers(model, None, None)
    assert f"image at layer {one.layers[0]} and the text at layer {one.layers[1]}." in one.markdown()
    assert whole.claims["answer"].nunique() > 1 and whole.claims[CONTROL].notna().all()


def test_an_interrupted_run_goes_on(model, items, tmp_path, monkeypatch):
    scored(model, items, tmp_path / "whole")
    generate, calls = model.generate, []

    def limited(*args, **more):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return generate(*args, **more)

    monkeypatch.setattr(model, "generate", limited, raising=False)
    with pytest.raises(KeyboardInterrupt):
        scored(model, items, tmp_path / "cut")
    with pytest.raises(ValueError, match="not finished"):
        read_hallucinations(tmp_path / "cut", "mine")
    calls.clear()
    scored(model, items, tmp_path / "cut")
    assert len(calls) == 1  # the third of three parts
    whole, cut = (read_hallucinations(tmp_path / name, "mine").claims for name in ("whole", "cut"))
    pd.testing.assert_frame_equal(whole, cut, check_exact=True)


def test_one_bad_picture_spoils_nothing_else(model, items, tmp_path):
    for n, item in enumerate(items):
        item.images[0].save(tmp_path / f"{n}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:200])
    files = [dataclasses.replace(item, images=(tmp_path / f"{n}.png",)) for n, item in enumerate(items)]
    scored(model, files, tmp_path / "out")
    failures = read_failures(tmp_path / "out")
    assert failures["id"].tolist() == ["q1"] and "1.png" in failures["error"][0]
    claims = read_hallucinations(tmp_path / "out", "mine").claims.set_index("id")
    assert list(claims.index) == ["q0", "q2", "q3", "q4"] and claims["contextual"].notna().all()
    assert np.isnan(claims[CONTROL]).tolist() == [True, True, False, False]  # q0 and q2 would have seen it


def test_other_settings_pictures_and_captions_are_refused(model, items, tmp_path):
    scored(model, items, tmp_path)
    for change, named in (
        ({"answer": "blue"}, "data.digest"), ({"noun": "thing"}, "data.digest"), ({"given": "a caption"}, "data.digest"),
        ({"images": items[0].images}, "data.digest"),
    ):  # fmt: skip
        changed = [*items[:4], dataclasses.replace(items[4], **change)]
        with pytest.raises(ValueError, match=named):
            scored(model, changed, tmp_path)
    elsewhere = [dataclasses.replace(item, source="another file, line 3") for item in items]
    assert scored(model, elsewhere, tmp_path).complete
    for settings, named in (((FAST, None, 9), "max_new_tokens: 3 there, 9 now"), ((FAST[:1], None, LIMIT), "settings.methods"),
                            ((FAST, None, LIMIT, 1), "image_layer: 2 there, 1 now"), ((FAST, {"a": "b"}, LIMIT), "vocabulary")):  # fmt: skip
        experiment = HallucinationExperiment(model, *settings)
        with pytest.raises(ValueError, match=named):
            run("hallucination", lambda: with_controls(items), experiment, tmp_path, experiment.settings, model=model,
                batch_size=2, batches_per_shard=1, progress=False)  # fmt: skip


def test_an_image_is_encoded_once(model, items, monkeypatch):
    """Two questions about each of two pictures, with the control and the blank picture: three runs of the tower."""
    pair = [dataclasses.replace(item, id=f"{item.id}{n}", images=items[k].images) for k in range(2) for n, item in enumerate(items[:2])]
    calls, run_tower = [], type(model).run_tower
    monkeypatch.setattr(type(model), "run_tower", lambda self, i: calls.append(1) or run_tower(self, i))
    result = detect_hallucinations(model, pair, "mine", [*FAST, "blind_difference"], max_new_tokens=1, progress=False)
    assert len(calls) == 3 and result.claims[[*FAST, "blind_difference"]].notna().all(axis=None)
    (claim,) = claims_of(pair[2:3], result.claims["answer"].tolist()[2:3])
    expected = all_scores(model, claim_inputs(model, claim), names=["contextual", "blind_difference"])
    assert {name: result.claims[name][2] for name in expected} == pytest.approx(expected, abs=1e-5)


# ---- the whole --------------------------------------------------------------------------------------


def made_up(n: int = 80) -> Hallucinations:
    """A result of which everything is known: "good" tells, "idle" does not, "none" has no scores."""
    rng = np.random.default_rng(0)
    correct = rng.random(n) < 0.6
    table = pd.DataFrame(
        {
            "key": range(n), "category": ["existence" if i % 2 else "attribute" for i in range(n)],
            "said": ["" if i % 2 == 0 else ("yes" if i % 4 == 1 else "no") for i in range(n)],
            "correct": [None if i > n - 5 else bool(c) for i, c in enumerate(correct)],
            "good": correct + 0.1 * rng.random(n), "idle": rng.random(n), "none": np.full(n, np.nan),
        }
    )  # fmt: skip
    return Hallucinations(table, ("good", "idle", "none"), "made up", "none", n_boot=100)


def test_the_result():
    result = made_up()
    table = result.to_dataframe().set_index(["method", "category"])
    assert set(table.index.get_level_values("category")) == {
        "attribute", "existence", "existence: said yes", "existence: said no", ALL, WITHIN,
    }  # fmt: skip
    assert table.loc[("good", ALL), "items"] == 76  # four need a judge
    judged = result.judged
    assert table.loc[("idle", ALL), "auroc"] == roc_auc_score(judged["correct"], judged["idle"])
    assert table.loc[("good", WITHIN), "auroc"] == 1.0 == table.loc[("good", "existence: said no"), "ap_hallucinated"]
    assert np.isnan(table.loc[("none", ALL), "auroc"]) and table.loc[("none", ALL), "unscored"] == 76
    shown = result.table()
    assert shown.loc["good", ALL] == "1.00 [1.00, 1.00]" and shown.loc["none", ALL] == "–"
    assert shown.loc["hallucinated", ALL] == f"{int((~judged['correct']).sum())} of 76"
    assert "attribute" in result.few() and WITHIN not in result.few()
    rows = pd.concat([judged[judged["correct"]].head(10), judged[~judged["correct"]].head(2)])
    assert dataclasses.replace(result, claims=rows).table().loc["good", ALL] == "1.00 [–]"  # two hallucinated answers
    with pytest.raises(ValueError, match="expected a category of attribute"):
        result.of("ocr")
    only = dataclasses.replace(result, claims=result.claims[result.claims["said"] != "no"])
    assert "existence: said no" not in set(only.to_dataframe()["category"]) and len(only.of("existence: said yes"))


def test_yes_is_compared_with_yes():
    """One category in which "yes" is mostly right and scored high: across yes and no the score wins, within them it knows nothing."""
    rng = np.random.default_rng(0)
    yes = np.arange(80) % 2 == 0
    table = pd.DataFrame({"key": range(80), "category": "existence", "said": np.where(yes, "yes", "no"),
                          "correct": rng.random(80) < np.where(yes, 0.8, 0.2), "score": rng.random(80) + yes})  # fmt: skip
    figures = Hallucinations(table, ("score",), "made up", "none", n_boot=20).to_dataframe().set_index("category")["auroc"]
    apart = [figures["existence: said yes"], figures["existence: said no"]]
    pairs = [(part["correct"].sum() * (~part["correct"]).sum()) for part in (table[yes], table[~yes])]
    assert figures[WITHIN] == pytest.approx(np.average(apart, weights=pairs)) and figures[WITHIN] < 0.65 < 0.75 < figures[ALL]


def test_the_pictures(tmp_path):
    result = made_up()
    result.plot(tmp_path / "roc.png")
    result.plot_scores(tmp_path / "scores.png", "existence")
    result.plot_intervals(tmp_path / "intervals.png")
    assert len(list(tmp_path.glob("*.png"))) == 3
    right = dataclasses.replace(result, claims=result.claims.assign(correct=True))
    right.plot(tmp_path / "right.png")
    with pytest.raises(ValueError, match="nothing to draw"):
        right.plot_intervals()


def test_from_questions_to_table_and_again(model, items, tmp_path):
    verdicts = {item.id: n % 2 == 0 for n, item in enumerate(items)}
    items = [dataclasses.replace(item, judge=NEEDS_A_JUDGE) for item in items]
    scored(model, items, tmp_path)
    open_ = read_hallucinations(tmp_path, "mine", n_boot=20)
    assert open_.claims["correct"].isna().all() and len(open_.judged) == 0 and open_.claims["contextual"].notna().all()
    judged = read_hallucinations(tmp_path, "mine", verdicts, n_boot=20)
    assert judged.claims["correct"].tolist() == list(verdicts.values())
    pd.testing.assert_frame_equal(judged.claims[FAST], open_.claims[FAST])
    assert judged.to_dataframe().query("category == 'all'")["hallucinated"].tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="1 judgements have an id that no item has"):
        read_hallucinations(tmp_path, "mine", {"nobody": True})
    with pytest.raises(ValueError, match="unknown methods magic"):
        detect_hallucinations(model, items, "mine", methods=["magic"])
    with pytest.raises(ValueError, match="q9 has no image"):
        detect_hallucinations(model, [question(9, images=())], "mine", methods=FAST)
    captions = detect_hallucinations(model, [caption_item()], "mine", FAST, {"dog": "dog", "bus": "bus"}, {"q0": False}, progress=False)
    assert captions.claims["correct"].tolist() == [True, False, True, True]  # what a caption names is judged by its objects


def test_judgements_are_read(tmp_path):
    file = tmp_path / "j.jsonl"
    file.write_text('{"id": 3, "correct": true}\n\n{"id": "b", "correct": false}\n')
    assert read_judgements(file) == {"3": True, "b": False}
    bad = {"{": "line 3: not JSON", '{"id": 1, "correct": 1}': "line 3: expected", '{"id": "3", "correct": true}': "judged twice"}
    for line, words in bad.items():
        file.write_text(f'{{"id": 3, "correct": true}}\n\n{line}\n')
        with pytest.raises(ValueError, match=words):
            read_judgements(file)


def test_the_command(tmp_path, capsys):
    for n in range(2):
        picture(84, 84, n).save(tmp_path / f"{n}.png")
    rows = [
        {"question_id": n, "image": f"{n % 2}.png", "text": f"Is there a {shape}?", "label": ("yes", "no")[n // 2]}
        for n, shape in enumerate(("star", "circle", "star", "heart"))
    ]
    (tmp_path / "coco_pope_random.json").write_text("\n".join(map(json.dumps, rows)) + "\n{\n")
    arguments = ["hallucination", "--data", f"pope:{tmp_path / 'coco_pope_random.json'}", "--out", str(tmp_path / "out")]
    arguments += ["--methods", "probability", "contextual", "--n-boot", "10", "--max-new-tokens", "2"]
    assert main(arguments) == 2 and "line 5: not JSON" in capsys.readouterr().err
    assert main([*arguments, "--skip-bad"]) == 0
    out = capsys.readouterr().out
    assert "left out" in out and "yes_rate" in out and "wrote" in out
    folder = tmp_path / "out"
    claims = pd.read_csv(folder / "claims.csv")
    assert claims["gold"].tolist() == ["yes", "yes", "no", "no"] and claims["probability"].between(0, 1).all()
    written = claims.to_csv()
    assert main([*arguments, "--skip-bad"]) == 0 and pd.read_csv(folder / "claims.csv").to_csv() == written
    assert main([*arguments, "--skip-bad", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "hallucination: 4 questions" in said and "to do here: 0 questions" in said and "memory" in said
    assert main([*arguments, "--skip-bad", "--batch-size", "3"]) == 2 and "batch_size: 8 there, 3 now" in capsys.readouterr().err
    assert main([*arguments, "--skip-bad", "--dry-run", "--sweep", "5"]) == 2 and "--sweep" in capsys.readouterr().err
    assert main(["hallucination", "--data", "coco:x"]) == 2 and "pope:PATH" in capsys.readouterr().err


def test_the_command_on_captions_alone(tmp_path, capsys):
    (tmp_path / "c.json").write_text(json.dumps([{"image_id": 1, "caption": "A dog on a bus.", "objects": ["dog"]}]))
    (tmp_path / "s.txt").write_text("dog, puppy\nbus\n")
    arguments = ["hallucination", "--data", f"chair:{tmp_path / 'c.json'}", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2 and "--synonyms" in capsys.readouterr().err
    assert main([*arguments, "--synonyms", str(tmp_path / "s.txt")]) == 0
    assert "CHAIRi" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out" / "chair.csv")
    assert table.loc[0, ["CHAIRs", "CHAIRi"]].tolist() == [1.0, 0.5]


def test_layers_of_the_contextual_lens(model, items):
    """The layers reach the score."""
    settings = {"methods": ["contextual"], "max_new_tokens": 1, "n_boot": 5, "progress": False}
    usual = detect_hallucinations(model, items[:2], "mine", **settings)
    other = detect_hallucinations(model, items[:2], "mine", image_layer=1, text_layer=3, **settings)
    claim = claims_of(items[:1], [usual.claims["answer"][0]])[0]
    expected = all_scores(model, claim_inputs(model, claim), names=["contextual"], image_layer=1, text_layer=3)
    assert other.claims["contextual"][0] == pytest.approx(expected["contextual"])
    assert usual.claims["contextual"][0] != pytest.approx(expected["contextual"])


def test_layers_are_chosen_on_answers_alone(model, items):
    """The same pair as a sweep over every layer by hand; a yes/no question's noun is left out."""
    said = [answer.text for answer in generate_answers(model, items, max_new_tokens=1)]
    half = [dataclasses.replace(item, answer=text if n % 2 else "wrong") for n, (item, text) in enumerate(zip(items, said))]
    sweep = choose_layers(model, half, max_new_tokens=1, progress=False)
    correct = [claim.correct for claim in claims_of(half, said)]
    assert sweep.n_items == len([text for text in said if text.strip()]) and 0 < sweep.n_correct < sweep.n_items
    for pair in ((0, 0), (2, 3), (sweep.image_layer, sweep.text_layer)):
        scores = [
            all_scores(model, claim_inputs(model, c), names=["contextual"], image_layer=pair[0], text_layer=pair[1])["contextual"]
            for c in claims_of(half, said)
        ]
        assert float(sweep.auroc[pair]) == pytest.approx(roc_auc_score(correct, scores))


def test_a_noun_chooses_no_layers(model, items, monkeypatch):
    said = ["red", "blue", "yes", " "]
    asked = [*items[:2], question(2, "Is there a dog?", "yes", judge=YES_NO, noun="dog"), items[3]]
    answers = iter([[Answer(text) for text in said]])
    monkeypatch.setattr("analyses.experiments.hallucination.generate_answers", lambda *args: next(answers))
    sweep = choose_layers(model, asked, progress=False)
    assert (sweep.n_items, sweep.n_correct) == (2, 1)  # neither the noun's answer nor the empty one
