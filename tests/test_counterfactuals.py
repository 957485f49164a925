"""Counterfactual pairs: made, read, checked."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import picture
from PIL import ImageFilter

from analyses.counterfactuals import (
    Candidate,
    blur_box,
    changed_positions,
    check_pairs,
    read_candidates,
    scene_candidates,
    swap_box,
)

BOX = (28, 0, 56, 28)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def candidates():
    return scene_candidates(12)


@pytest.fixture(scope="module")
def pairs(scenes, candidates):
    return check_pairs(scenes, candidates, progress=False)


def test_kept_pairs_are_as_promised(scenes, pairs):
    assert len(pairs) >= 4
    for pair in pairs:
        assert pair.clean.shape == pair.corrupted.shape and pair.answer_id != pair.other_id
        for prompt, wanted, difference in (
            (pair.clean, pair.answer_id, pair.clean_difference),
            (pair.corrupted, pair.other_id, pair.corrupted_difference),
        ):
            logits = scenes(prompt)
            assert int(logits[0, -1].argmax()) == wanted
            assert abs(float(pair.metric(logits)) - difference) < 1e-4
        assert pair.clean_difference - pair.corrupted_difference >= 1
        assert set(pair.changed.tolist()) <= set(pair.on_boxes.tolist())


def test_what_is_refused_keeps_its_reason(scenes, candidates):
    good = next(c for c in candidates if len(check_pairs(scenes, [c], progress=False)))
    wide = picture(168, 112)
    bad = [
        (Candidate(good.question, good.clean, good.clean, good.answer, good.answer), "one answer"),
        (Candidate(good.question, good.clean, wide, good.answer, good.other), "different grids"),
        (Candidate(good.question, good.clean, good.corrupted, good.other, good.answer), "clean answered wrongly"),
        (Candidate(good.question, good.clean, good.clean, good.answer, good.other), "corrupted answered wrongly"),
        (Candidate(good.question, good.clean, good.corrupted, good.answer, "not one token"), "single token"),
    ]
    found = check_pairs(scenes, [candidate for candidate, _ in bad], progress=False)
    assert not len(found) and len(found.refused) == len(bad)
    for (_, reason), (_, wanted) in zip(found.refused, bad):
        assert wanted in reason
    assert sum(found.reasons.values()) == len(bad) and set(found.to_dataframe()["refused"]) == set(found.reasons)
    far = check_pairs(scenes, [good], min_gap=1e6, progress=False)
    assert "closer than" in far.refused[0][1]
    blind = check_pairs(scenes, [Candidate(good.question, good.clean, good.corrupted, good.answer, None)], progress=False)
    assert len(blind) == 1  # the model's own answer to the corrupted image is another


def test_changed_tokens_are_those_whose_pixels_change(model):
    image = picture(112, 84, 1)
    clean = model.to_inputs("what?", images=[image])
    corrupted = model.to_inputs("what?", images=[swap_box(image, BOX, picture(112, 84, 2))])
    assert torch.equal(changed_positions(clean, corrupted), clean.positions(BOX))
    assert not len(changed_positions(clean, clean))
    batch = [model.to_inputs(["a", "what?"], images=[[picture(56, 56)], [i]]) for i in (image, swap_box(image, BOX, picture(112, 84, 2)))]
    assert not len(changed_positions(*batch, row=0))
    assert torch.equal(changed_positions(*batch, row=1), batch[0].positions(BOX, 1))


def test_boxes_are_swapped_and_blurred():
    image, other = picture(112, 84, 1), picture(112, 84, 2)
    inside = np.zeros((84, 112), bool)
    inside[0:28, 28:56] = True
    swapped, blurred = np.array(swap_box(image, BOX, other)), np.array(blur_box(image, BOX))
    for made in (swapped, blurred):
        assert (made[~inside] == np.array(image)[~inside]).all()
    assert (swapped[inside] == np.array(other)[inside]).all()
    assert blurred[inside].std() < 0.5 * np.array(image)[inside].std()
    with pytest.raises(ValueError, match="one size"):
        swap_box(image, BOX, picture(84, 84))
    for box in ((0, 0, 200, 20), (0, 0, 20, 200), (30, 0, 30, 20), (-5, 0, 10, 10), (0, -5, 10, 10)):
        with pytest.raises(ValueError, match="not inside|outside the image|x0 < x1"):
            blur_box(image, box)


def test_tables(tmp_path):
    rows = [{"question": "what?", "clean": "a.png", "corrupted": "b.png", "answer": "red", "other": "blue", "box": "0,0,28,28"},
            {"question": "and?", "clean": "a.png", "corrupted": "c.png", "answer": "red"}]  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "pairs.csv", index=False)
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for path in (tmp_path, tmp_path / "lines.jsonl"):
        first, second = read_candidates(path)
        assert (first.clean, first.answer, first.other) == (tmp_path / "a.png", "red", "blue")
        assert first.boxes == ((0.0, 0.0, 28.0, 28.0),) and second.other is None and second.boxes == ()
    (tmp_path / "bad.jsonl").write_text('{"question": "what?"}')
    for name, message in (("bad.jsonl", "no clean, corrupted, answer"), ("nowhere", "expected a .csv")):
        with pytest.raises(ValueError, match=message):
            read_candidates(tmp_path / name)


def test_as_many_pairs_as_asked_for(scenes, candidates):
    """Candidates are taken until n are kept, and no further; one that cannot be read is refused with its reason."""
    good = next(c for c in candidates if len(check_pairs(scenes, [c], progress=False)))
    bad = replace(good, clean="not/there.png")
    drawn = iter([bad, *[good] * 6])
    found = check_pairs(scenes, drawn, n=2, progress=False)
    assert len(found) == 2 and len(list(drawn)) >= 3
    assert [candidate for candidate, _ in found.refused] == [bad] and "not/there.png" in found.refused[0][1]
    assert len(check_pairs(scenes, [good] * 3, n=5, progress=False)) == 3


def test_grids_of_one_length_are_told_apart(scenes, candidates):
    """2×6 and 3×4 image tokens: prompts of one shape whose positions mean something else."""
    good = candidates[0]
    flat, square = picture(168, 56), picture(112, 84)
    assert scenes.to_inputs("x", images=[flat]).shape == scenes.to_inputs("x", images=[square]).shape
    found = check_pairs(scenes, [replace(good, clean=flat, corrupted=square)], progress=False)
    assert found.refused[0][1] == "the images give different grids"


def test_how_far_a_box_is_blurred():
    """A Gaussian of half the longer side, unless another is given."""
    image, box = picture(112, 84, 1), (10, 20, 50, 44)
    for radius, expected in ((None, 20.0), (3.0, 3.0)):
        wanted = image.copy()
        wanted.paste(image.filter(ImageFilter.GaussianBlur(expected)).crop(box), box[:2])
        assert np.array_equal(np.array(blur_box(image, box, radius)), np.array(wanted))


def test_bad_rows_of_tables_are_named(tmp_path):
    head = "question,clean,corrupted,answer,box\n"
    good = 'what?,a.png,b.png,red,"0,0,28,28"\n'
    for text, message in (
        (good + 'q,a.png,b.png,red,"0,0,x,28"', "row 2.*a box is x0,y0,x1,y1"),
        (good + "q,a.png", "row 2: no corrupted"),
    ):
        (tmp_path / "pairs.csv").write_text(head + text)
        with pytest.raises(ValueError, match=message):
            read_candidates(tmp_path / "pairs.csv")
        kept, bad = read_candidates(tmp_path / "pairs.csv", keep_bad=True)
        assert kept.boxes and not kept.problem and "row 2" in bad.problem and bad.id == "pairs-2 (row 2)"
    (tmp_path / "pairs.csv").write_text(head + "q,a.png,b.png,red,,,\n" + good)
    long, kept = read_candidates(tmp_path / "pairs.csv", keep_bad=True)
    assert "more than the header" in long.problem and kept.answer == "red"
    (tmp_path / "pairs.csv").write_text(head + 'q,a.png,b.png,"red')
    with pytest.raises(ValueError, match="pairs.csv, line .*: not CSV"):
        read_candidates(tmp_path / "pairs.csv")
    (tmp_path / "pairs.csv").write_text(head + "q,a.png,b.png,5 red,\n")
    assert read_candidates(tmp_path / "pairs.csv")[0].id == "pairs-1"
