"""Trajectories: fixtures of the definitions, identities, and the model's own logits."""

from __future__ import annotations

import math

import pytest
import torch

from analyses.trajectory import (
    OUTCOMES,
    Trajectories,
    answer_ids,
    answer_trajectory,
    flips,
    outcome,
    shift,
    stability,
    trajectory_of_logits,
)

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
