"""Hallucination detection: metrics by hand and against scikit-learn, orientation, and runs that are cut short."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import picture
from sklearn.metrics import average_precision_score, roc_auc_score
from tiny import tiny_hf

from analyses.baselines import SCORES, all_scores
from analyses.benchmarks import EXACT, NEEDS_A_JUDGE, OBJECTS, YES_NO, Question
from analyses.detection import detection, weighted_figures, within
from analyses.hallucination import (
    ALL, CONTROL, WITHIN, Claim, Hallucinations, _other_pictures, choose_layers, claim_inputs, claims_of,
    detect_hallucinations, fingerprint,
    generate_answers, read_judgements, score_claims,
)  # fmt: skip
from analyses.ledger import Ledger
from hooked_qwen2vl import HookedQwen2VL
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
    inside = within(correct, score, groups, n_boot=100)
    wins = [
        (score[i] > score[j]) + 0.5 * (score[i] == score[j])
        for i in range(120) for j in range(120)
        if correct[i] and not correct[j] and groups[i] == groups[j]
    ]  # fmt: skip
    assert inside["auroc"] == pytest.approx(np.mean(wins))
    assert inside["auroc_low"] < 0.5 < inside["auroc_high"] < detection(correct, score, 10)["auroc"]
    assert np.isnan(within([True, True], [1, 2], ["a", "b"])["auroc"])


# ---- what is scored ---------------------------------------------------------------------------------


def test_yes_and_no_score_the_noun_with_opposite_signs(model):
    item = question(1, "Is there a red thing?", "yes", judge=YES_NO, noun="red thing")
    claims = claims_of([item] * 2, ["yes", "no"])
    assert [(c.correct, c.said, c.noun) for c in claims] == [(True, "yes", "red thing"), (False, "no", "red thing")]
    claims[1] = dataclasses.replace(claims[1], key="other")
    scores = score_claims(model, claims, list(SCORES), progress=False)
    yes, no = scores["q1"], scores["other"]
    for name in ("contextual", "internal_confidence"):
        assert yes[name] == pytest.approx(-no[name]) and yes[name] != 0
    assert yes["probability"] > 0 and no["probability"] > 0 and yes["probability"] != no["probability"]
    plain = score_claims(model, [Claim("plain", item, "yes", True)], ["contextual"], progress=False)["plain"]
    assert plain["contextual"] != pytest.approx(yes["contextual"])  # the word "yes" itself is another score


@pytest.mark.parametrize(
    "answer, said", [("Yes.", "yes"), (" no way", "no"), ("NO", "no"), ("There is no dog", ""), ("Yes, but no dog", ""), ("", "")]
)
def test_when_a_noun_is_scored(answer, said):
    (claim,) = claims_of([question(1, "Is there a dog?", "yes", judge=YES_NO, noun="dog")], [answer])
    assert claim.said == said and bool(claim.noun) == bool(said)


def test_orientation_the_model_believes_its_own_answer(model, items):
    answers = [answer.text for answer in generate_answers(model, items, max_new_tokens=1, progress=False)]
    with torch.no_grad():
        logits = model(model.to_inputs(items[0].question, images=list(items[0].images)))[0, -1]
    least = model.tokenizer.decode([int(logits[:256].argmin())])
    own, other = claims_of(items[:1] * 2, [answers[0], least])
    other = dataclasses.replace(other, key="other")
    scores = score_claims(model, [own, other], ["probability", "mean_log_prob"], progress=False)
    assert scores["q0"]["probability"] > scores["other"]["probability"]
    assert scores["q0"]["mean_log_prob"] > scores["other"]["mean_log_prob"]


def caption_item(**more) -> Question:
    caption = "A dog and a red bus, two dogs."
    return question(0, "describe", "", judge=OBJECTS, given=caption, truth=("dog",), category="caption", **more)


def test_every_object_of_a_caption_is_a_claim(model):
    item = caption_item()
    (answer,) = generate_answers(model, [item], progress=False)
    claims = claims_of([item], [answer.text], {"dog": "dog", "bus": "bus"})
    assert [(item.given[slice(*c.mention)], c.correct) for c in claims] == [("dog", True), ("bus", False), ("dogs", True)]
    for claim in claims:
        inputs = claim_inputs(model, claim)
        at = inputs.positions("answer").tolist()
        start, end = claim.mention
        assert model.tokenizer.decode(inputs.tokens[0, at]).strip() == item.given[start:end]
        assert model.tokenizer.decode(inputs.tokens[0, inputs.positions("history")]).strip() == item.given[:start].strip()
        with torch.no_grad():
            log_probs = model(inputs).log_softmax(-1)[0]
        by_hand = log_probs[[p - 1 for p in at], inputs.tokens[0, at]].mean()
        ours = score_claims(model, [claim], ["mean_log_prob"], progress=False)[claim.key]
        assert ours["mean_log_prob"] == pytest.approx(float(by_hand), abs=1e-4)
    with pytest.raises(ValueError, match="vocabulary"):
        claims_of([item], [item.given])


def test_the_control_sees_the_nearest_other_picture():
    shots = [(picture(28, 28, seed),) for seed in (0, 0, 1, 1, 0)]
    found = _other_pictures([question(n, images=shot) for n, shot in enumerate(shots)])
    assert found == [shots[2], shots[2], shots[1], shots[1], shots[3]]
    assert _other_pictures([question(n, images=shots[0]) for n in range(2)]) == [None, None]


def test_the_control_is_the_score_with_the_other_picture(model, items):
    claims = claims_of(items[:2], ["red", "red"])
    scores = score_claims(model, claims, ["contextual", CONTROL], progress=False)
    swapped = dataclasses.replace(items[1], images=items[0].images)
    expected = score_claims(model, claims_of([swapped], ["red"]), ["contextual"], progress=False)["q1"]["contextual"]
    assert scores["q1"][CONTROL] == pytest.approx(expected) and scores["q1"]["contextual"] != pytest.approx(expected)


def test_what_cannot_be_scored_is_said(model, items):
    claims = claims_of(items[:2], ["", "red"])

    def refuse(*args, **more):
        raise ValueError("not this one")

    scores = score_claims(model, claims, FAST, progress=False, scorer=refuse)
    assert [scores[key]["error"] for key in ("q0", "q1")] == ["the answer is empty", "not this one"]
    assert not set(FAST) & {name for row in scores.values() for name in row}


# ---- runs that are cut short ------------------------------------------------------------------------


class Cut(Exception):
    pass


def cut_after(n: int, function):
    """The function, which gives up at its call n + 1; `calls` counts."""

    def limited(*args, **more):
        limited.calls += 1
        if limited.calls > n:
            raise Cut
        return function(*args, **more)

    limited.calls = 0
    return limited


def test_answers_are_gone_on_with(model, items, tmp_path, monkeypatch):
    whole = generate_answers(model, items, tmp_path / "whole.jsonl", max_new_tokens=LIMIT, progress=False)
    generate = model.generate
    monkeypatch.setattr(model, "generate", cut_after(3, generate), raising=False)
    with pytest.raises(Cut):
        generate_answers(model, items, tmp_path / "cut.jsonl", max_new_tokens=LIMIT, progress=False)
    rest = cut_after(99, generate)
    monkeypatch.setattr(model, "generate", rest, raising=False)
    assert generate_answers(model, items, tmp_path / "cut.jsonl", max_new_tokens=LIMIT, progress=False) == whole
    assert rest.calls == 2
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len({answer.text for answer in whole}) > 1


def test_scores_are_gone_on_with(model, items, tmp_path):
    claims = claims_of(items, ["red", "blue", "red", "blue", "red"])
    whole = score_claims(model, claims, FAST, tmp_path / "whole.jsonl", progress=False)
    with pytest.raises(Cut):
        score_claims(model, claims, FAST, tmp_path / "cut.jsonl", progress=False, scorer=cut_after(2, all_scores))
    rest = cut_after(99, all_scores)
    assert score_claims(model, claims, FAST, tmp_path / "cut.jsonl", progress=False, scorer=rest) == whole
    assert rest.calls == 3
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_other_settings_pictures_and_weights_are_refused(model, items, tmp_path):
    path, settings = tmp_path / "a.jsonl", {"weights": fingerprint(model)}
    generate_answers(model, items[:1], path, settings, LIMIT, progress=False)
    with pytest.raises(ValueError, match="max_new_tokens was 3, now 4"):
        generate_answers(model, items[:1], path, settings, LIMIT + 1, progress=False)
    with pytest.raises(ValueError, match="picture of q0 changed"):
        changed = dataclasses.replace(items[0], images=items[1].images)
        generate_answers(model, [changed], path, settings, LIMIT, progress=False)
    other = HookedQwen2VL.from_hf(tiny_hf(seed=1))
    with pytest.raises(ValueError, match="other settings .weights"):
        generate_answers(model, items[:1], path, {"weights": fingerprint(other)}, LIMIT, progress=False)
    scores = tmp_path / "s.jsonl"
    score_claims(model, claims_of(items[:1], ["red"]), ["probability"], scores, progress=False)
    with pytest.raises(ValueError, match="q0 was scored with another answer"):
        score_claims(model, claims_of(items[:1], ["blue"]), ["probability"], scores, progress=False)


def test_one_changed_weight_is_another_model():
    one = HookedQwen2VL.from_hf(tiny_hf())
    before = fingerprint(one)
    assert before == fingerprint(HookedQwen2VL.from_hf(tiny_hf()))
    with torch.no_grad():
        one.blocks[1].mlp.W_in[3, 5] += 1e-3
    assert fingerprint(one) != before


def test_a_file_cut_anywhere_keeps_its_whole_rows(tmp_path):
    path, settings = tmp_path / "l.jsonl", {"a": 1}
    ledger = Ledger(path, settings)
    for n in range(3):
        ledger.add(f"k{n}", {"text": "é\n" * n, "nan": float("nan")})
    data = path.read_bytes()
    ends = [n + 1 for n, byte in enumerate(data) if byte == 10]
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        again = Ledger(path, settings)
        assert list(again.rows) == [f"k{n}" for n in range(3)][: max(0, sum(end <= length for end in ends) - 1)]
        again.add("new", {"text": ""})
        assert list(Ledger(path, settings).rows)[-1] == "new"
    path.write_bytes(data[: ends[0]] + b"{broken}\n" + data[ends[0] :])
    with pytest.raises(ValueError, match="line 2: not JSON"):
        Ledger(path, settings)


def test_a_killed_writer(tmp_path):
    """SIGKILL in the middle of writing: what is there is whole, in order, and gone on with."""
    path = tmp_path / "l.jsonl"
    code = (
        "import sys; from analyses.ledger import Ledger; ledger = Ledger(sys.argv[1], {})\n"
        "for n in range(10**9): ledger.add(str(n), {'text': 'x' * 5000})"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    deadline = time.monotonic() + 30
    while (not path.is_file() or path.stat().st_size < 200_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    rows = Ledger(path, {}).rows
    assert list(rows) == [str(n) for n in range(len(rows))] and len(rows) > 20
    assert all(row == {"text": "x" * 5000} for row in rows.values())


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
    with pytest.raises(ValueError, match="expected a category of attribute"):
        result.of("ocr")


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
    run = lambda **more: detect_hallucinations(  # noqa: E731
        model, items, "mine", tmp_path, methods=FAST, max_new_tokens=LIMIT, n_boot=20, progress=False, **more
    )
    open_ = run()
    assert open_.claims["correct"].isna().all() and len(open_.judged) == 0 and open_.claims["contextual"].notna().all()
    judged = run(judgements=verdicts)  # from the files
    assert judged.claims["correct"].tolist() == list(verdicts.values())
    pd.testing.assert_frame_equal(judged.claims[FAST], open_.claims[FAST])
    assert judged.to_dataframe().query("category == 'all'")["hallucinated"].tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="unknown methods magic"):
        detect_hallucinations(model, items, "mine", methods=["magic"])
    with pytest.raises(ValueError, match="1 judgements have an id that no item has"):
        run(judgements={"nobody": True})
    with pytest.raises(ValueError, match="have no image"):
        detect_hallucinations(model, [question(9, images=())], "mine", methods=FAST)


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
    folder = tmp_path / "out" / "hallucination_pope_coco_pope_random"
    claims = pd.read_csv(folder / "claims.csv")
    assert claims["gold"].tolist() == ["yes", "yes", "no", "no"] and claims["probability"].between(0, 1).all()
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 5
    assert main(["hallucination", "--data", "coco:x"]) == 2 and "pope:PATH" in capsys.readouterr().err


def test_the_command_on_captions_alone(tmp_path, capsys):
    (tmp_path / "c.json").write_text(json.dumps([{"image_id": 1, "caption": "A dog on a bus.", "objects": ["dog"]}]))
    (tmp_path / "s.txt").write_text("dog, puppy\nbus\n")
    arguments = ["hallucination", "--data", f"chair:{tmp_path / 'c.json'}", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2 and "--synonyms" in capsys.readouterr().err
    assert main([*arguments, "--synonyms", str(tmp_path / "s.txt")]) == 0
    assert "CHAIRi" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out" / "hallucination_chair_c" / "chair.csv")
    assert table.loc[0, ["CHAIRs", "CHAIRi"]].tolist() == [1.0, 0.5]


def test_layers_of_the_contextual_lens(model, items, tmp_path):
    """The layers reach the score, and a file of other layers is refused."""
    path = tmp_path / "run"
    settings = {"methods": ["contextual"], "max_new_tokens": 1, "n_boot": 5, "progress": False}
    usual = detect_hallucinations(model, items[:2], "mine", path, **settings)
    other = detect_hallucinations(model, items[:2], "mine", None, image_layer=1, text_layer=3, **settings)
    claim = claims_of(items[:1], [usual.claims["answer"][0]])[0]
    expected = all_scores(model, claim_inputs(model, claim), names=["contextual"], image_layer=1, text_layer=3)
    assert other.claims["contextual"][0] == pytest.approx(expected["contextual"])
    assert usual.claims["contextual"][0] != pytest.approx(expected["contextual"])
    with pytest.raises(ValueError, match="image_layer was 2, now 1"):
        detect_hallucinations(model, items[:2], "mine", path, image_layer=1, **settings)


def test_layers_are_chosen_on_answers_alone(model, items):
    """The same pair as a sweep over every entry by hand; a yes/no question's noun is left out."""
    said = [answer.text for answer in generate_answers(model, items, max_new_tokens=1, progress=False)]
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
