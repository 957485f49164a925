"""Rows of data files: whatever a row holds, a loader gives a question or names file, line and reason; a run goes on."""

from __future__ import annotations

import json
import os

import pandas as pd
import pytest
from conftest import picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from analyses.counterfactuals import read_candidates
from analyses.data.benchmarks import load_amber, load_chair, load_grounding, load_hqh, load_mmhal, load_pope
from analyses.data.examples import Example, Unreadable, examples
from analyses.data.schema import UnknownColumns
from analyses.experiments.hallucination import read_judgements
from analyses.runs.engine import read_failures, read_results, run
from analyses.runs.plan import size_by_pixels
from hooked_qwen2vl.files import open_regular

ROWS = 1000  # a loader
GOOD = {
    "question": {"question": "what?", "image": "a.png", "answer": "red", "id": 7, "domain": "d", "category": "c", "candidates": ["red", 3]},
    "pair": {"question": "what?", "clean": "a.png", "corrupted": "b.png", "answer": "x", "other": "y", "box": [0, 0, 5, 5], "id": "p"},
    "judgement": {"id": 3, "correct": True},
    "pope": {"question_id": 1, "image": "a.png", "text": "Is there a dog?", "label": "yes"},
    "hqh": {"id": 1, "image": "a.png", "instruction": "what?", "ground_truth": "it", "type": "OCR"},
    "amber": {"id": 1, "image": "a.png", "query": "Is there a dog?"},
    "mmhal": {"question": "what?", "gt_answer": "it", "model_answer": None, "image_id": 3, "image_content": ["dog"]},
    "chair": {"image_id": 3, "caption": "a dog", "objects": ["dog"]},
    "grounding": {"image": "a.png", "phrase": "the dog", "bbox": [2, 3, 10, 5]},
}
ANNOTATIONS = [{"id": 1, "type": "generative", "truth": ["dog"], "hallu": []}, {"type": "relation", "truth": "no"}, {"type": 5}]


def load(kind, file):
    """(rows read, reasons of the others), as the loader of the kind gives them."""
    skip = {"skip_bad": True, "check_images": False}
    if kind == "question":
        found = list(examples(file, keep_bad=True))
        return [e for e in found if not isinstance(e, Unreadable)], [e.problem for e in found if isinstance(e, Unreadable)]
    if kind == "pair":
        found = read_candidates(file, keep_bad=True)
        return [c for c in found if not c.problem], [c.problem for c in found if c.problem]
    if kind == "judgement":
        return list(read_judgements(file).items()), []
    loader = {
        "pope": load_pope,
        "hqh": load_hqh,
        "amber": load_amber,
        "mmhal": load_mmhal,
        "chair": load_chair,
        "grounding": load_grounding,
    }
    found = loader[kind](file, **skip)
    return list(found), list(found.problems)


TEXTS = st.text(st.characters(codec=None), max_size=8) | st.sampled_from(
    ["", " ", "a\u2028b", "\ud800", "x" * 5000, "a\0b", "../..", "/dev/zero"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mutated(draw, kind):
    """A good row of the kind with some cells replaced, left out or added; or no row at all."""
    row = dict(GOOD[kind])
    for name in draw(st.lists(st.sampled_from(sorted(row)), max_size=3)):
        if draw(st.booleans()):
            row[name] = draw(VALUES)
        else:
            row.pop(name, None)
    row |= draw(st.dictionaries(TEXTS | st.sampled_from(["boxes", "images", "img"]), VALUES, max_size=1))
    return draw(st.just(row) | st.just(row) | st.just(row) | VALUES)


@pytest.mark.slow
@pytest.mark.parametrize("kind", GOOD)
def test_a_thousand_rows_are_read_or_refused_by_line(kind, tmp_path):
    """Seeded; a reason has file and line and can be written to a file; what is read holds whole characters."""
    file = tmp_path / f"{kind}.jsonl"
    (tmp_path / "annotations.json").write_text(json.dumps(ANNOTATIONS))
    counts = {"read": 0, "refused": 0}

    @settings(max_examples=ROWS // 4, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(mutated(kind), min_size=4, max_size=4))
    def check(rows):
        file.write_text("\n".join(json.dumps(row) for row in [GOOD[kind], *rows]), encoding="utf-8")
        try:
            good, reasons = load(kind, file)
        except ValueError as error:
            assert kind == "judgement" or "begins with" in str(error)  # of a judge's file, every line counts
            good, reasons = [1], [str(error)]
        for reason in reasons:
            assert f"{kind}.jsonl" in reason and "line " in reason and reason.encode() and len(reason) < 900, reason
        if kind not in ("judgement",):
            assert len(good) + len(reasons) == 5 and good, (rows, good, reasons)
        for item in good if kind in ("question", "pair") else ():
            texts = [item.question, item.answer, item.id, item.domain, item.category]
            assert all(isinstance(text, str) and text.encode() is not None for text in texts)
        counts["read"] += len(good)
        counts["refused"] += len(reasons)

    with pytest.warns(UnknownColumns) if kind in ("question", "pair", "grounding") else _nothing():
        check()
    assert min(counts.values()) > ROWS / 20


class _nothing:
    def __enter__(self): ...
    def __exit__(self, *about): ...


HOSTILE = [
    ({"question": 5}, "a text, got 5"), ({"image": 5}, "the name of a file, got 5"), ({"image": ["a.png"]}, "the name of a file"),
    ({"question": None}, "a text, got None"), ({"candidates": "red"}, "a list, each a text, got 'red'"), ({"candidates": [None]}, "a list"),
    ({"question": "\ud800"}, "half a character"), ({"id": "\udfff"}, "half a character"), ({"answer": "a\ud800"}, "half a character"),
    ({"category": "\ud800"}, "half a character"), ({"candidates": ["red", "\ud800"]}, "half a character"), ({"image": "x" * 5000}, "5000 bytes"),
    ({"image": "a\0.png"}, "NUL"), ({"id": 1.5}, "got 1.5"), ({"images": ["a.png"]}, "both there"), ({"answer": True}, "got True"),
    ({"question": "  "}, "a text, got '  '"), ({"candidate": ["red"]}, "unknown column 'candidate'"), ({"domain": None}, "a text, got None"),
]  # fmt: skip


def test_a_hostile_row_is_recorded_and_the_run_goes_on(tmp_path):
    """Each kind of bad row by itself between two good ones."""
    picture(56, 56).save(tmp_path / "a.png")
    rows = [{"question": "what?", "image": "a.png", "id": "first"}]
    rows += [{"question": "what?", "image": "a.png", "id": f"q{n}"} | change for n, (change, _) in enumerate(HOSTILE)]
    lines = [json.dumps(row) for row in rows]
    lines += ['{"question": "a", "question": "b"}', '{"question": NaN}', "[" * 100000, '{"id": ' + "9" * 5000 + "}", "{", "", "7"]
    lines += [json.dumps({"question": "what\u2028else?", "image": "a.png", "id": "last"}, ensure_ascii=False)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines), encoding="utf-8")

    def data():
        return examples(tmp_path, keep_bad=True)

    run("lengths", data, lambda batch: [{"id": e.id, "n": len(e.question)} for e in batch], tmp_path / "out", progress=False)
    read, failed = read_results(tmp_path / "out"), read_failures(tmp_path / "out")
    assert read["id"].tolist() == ["first", "last"] and read["n"].tolist() == [5, 10]
    expected = [reason for _, reason in HOSTILE] + [
        "comes twice",
        "NaN is not JSON",
        "nested too deep",
        "5000 digits",
        "not JSON",
        "an object, got 7",
    ]
    assert len(failed) == len(expected)
    for words, error in zip(expected, failed["error"]):
        assert words in error and "questions.jsonl, line " in error and len(error) < 400
    with pytest.raises(ValueError, match="questions.jsonl, line 2: .*a text, got 5"):
        list(examples(tmp_path))


def test_hostile_images_are_recorded_while_planning_and_working(tmp_path):
    """A bomb, a pipe, a device, a folder, a name too long, a damaged header: named, none of them opened; nothing hangs."""
    picture(56, 56).save(tmp_path / "good.png")
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "header.png").write_bytes((tmp_path / "good.png").read_bytes()[:20] + b"\xff" * 20)
    (tmp_path / "empty.png").write_bytes(b"")
    bad = ["bomb.png", "pipe.png", "folder.png", "loop.png", "device.png", "header.png", "empty.png", "x" * 5000, "a\0b"]
    images = ["good.png", *bad, "good.png"]
    data = [Example(f"q{n}", "what?", "", (tmp_path / name,)) for n, name in enumerate(images)]
    data += [Example("five", "what?", "", (5,)), Example("none", "what?", "", (None,)), Example("text", "what?", "", "a.png")]
    data += [Example("\ud800", "what?", ""), Example("half", "\ud800", ""), Example("number", 3, ""), Example("last", "what?", "")]
    state = run("lengths", data, lambda batch: [{"id": e.id} for e in batch], tmp_path / "out", progress=False, batches_per_shard=2)
    assert state.complete
    assert read_results(tmp_path / "out")["id"].tolist() == ["q0", "q10", "last"]
    failures = read_failures(tmp_path / "out").set_index("id")["error"]
    for name, words in (("q1", "too large"), ("q2", "a pipe"), ("q3", "a folder"), ("q5", "a device"), ("half", "half a character"),
                        ("\\ud800", "half a character"), ("number", "a text, got 3"), ("text", "a tuple"), ("five", "int")):  # fmt: skip
        assert words in failures[name], failures[name]
    assert failures.str.len().max() < 900
    with pytest.raises(ValueError, match="not a readable image"):
        size_by_pixels(Example("b", "what?", "", (tmp_path / "bomb.png",)))


def test_only_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/null"):
        with pytest.raises(ValueError, match="is not a file but a"):
            open_regular(path)
        for read in (read_judgements, load_pope, lambda file: list(examples(file)), read_candidates):
            with pytest.raises(ValueError, match="not a file|got|no rows|pairs|expected"):
                read(path)
    with pytest.raises(ValueError, match="no file can be called"):
        open_regular("a\0b")


def test_pairs_are_read_as_they_stand(tmp_path):
    """0 is an answer; a number is its digits; a column that looks like another is not ignored."""
    pair = {"question": "a\u2028b", "clean": "a.png", "corrupted": "b.png", "answer": 3, "other": 0}
    for name in ("pairs.jsonl", "pairs.csv"):
        if name.endswith("csv"):
            pd.DataFrame([pair]).to_csv(tmp_path / name, index=False)
        else:
            (tmp_path / name).write_text(json.dumps(pair, ensure_ascii=False), encoding="utf-8")
        (found,) = read_candidates(tmp_path / name)
        assert (found.question, found.answer, found.other) == ("a\u2028b", "3", "0")
    for change, words in (({"boxes": [[0, 0, 5, 5]]}, "unknown column 'boxes': is it .box"), ({"other": None}, "got None"),
                          ({"box": [0, 0, 5]}, "four numbers"), ({"box": "a,b"}, "x0,y0,x1,y1")):  # fmt: skip
        (tmp_path / "bad.jsonl").write_text(json.dumps(pair | change))
        with pytest.raises(ValueError, match=f"bad.jsonl, line 1: .*({words})"):
            read_candidates(tmp_path / "bad.jsonl")
    with pytest.warns(UnknownColumns, match="'source'"):
        (tmp_path / "more.jsonl").write_text(json.dumps(pair | {"source": "web"}))
        read_candidates(tmp_path / "more.jsonl")
    (tmp_path / "wide.csv").write_text("question,clean,corrupted,answer\nwhat?,a.png,b.png,x,y\n")
    with pytest.raises(ValueError, match="wide.csv, row 1: 1 cells more"):
        read_candidates(tmp_path / "wide.csv")


def test_questions_of_two_files_share_no_id(tmp_path):
    for domain in ("ants", "bats"):
        (tmp_path / domain).mkdir()
        (tmp_path / domain / "questions.jsonl").write_text('{"id": "same", "question": "what?"}')
    found = list(examples(tmp_path, keep_bad=True))
    assert [type(e) for e in found] == [Example, Unreadable] and "comes twice" in found[1].problem and found[1].domain == "bats"
