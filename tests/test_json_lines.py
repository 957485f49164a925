"""One reader of JSON rows: arrays and lines, what is wrong named by file and line."""

from __future__ import annotations

import json

import pytest

from analyses.counterfactuals import read_candidates
from analyses.data.benchmarks import load_chair, read_synonyms
from analyses.data.examples import examples
from analyses.data.json_lines import read_rows, rows_and_errors
from analyses.experiments.hallucination import read_judgements

ODD = "a\u2028b\u2029c\x0bd\x0ce\x85f\x1cg\x1eh"  # all of these end a line for str.splitlines
ROWS = [{"id": 1, "text": ODD}, {"id": "二", "text": "[{"}, {"id": 3, "text": '"\\'}]


def lines(rows, ascii_only: bool) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_arrays_and_lines_hold_the_same_rows(ascii_only, mark, tmp_path):
    texts = {
        "lines": (lines(ROWS, ascii_only), [1, 2, 3]),
        "spaced": ("\n  \n" + lines(ROWS, ascii_only).replace("\n", "\r\n\r\n") + "\n\n", [3, 5, 7]),
        "array": (json.dumps(ROWS, ensure_ascii=ascii_only), [1, 1, 1]),
        "pretty": ("\n " + json.dumps(ROWS, ensure_ascii=ascii_only, indent=1) + "\n", [3, 7, 11]),
    }
    for name, (text, numbers) in texts.items():
        file = tmp_path / f"{name}.json"
        file.write_bytes((mark + text).encode())
        assert list(read_rows(file)) == list(zip(numbers, ROWS))


def test_what_is_wrong_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    for text, message in (
        ('{"a": 1}\n\n{"a": }\n', "line 3: not JSON"),
        ('{"a": 1}\n[2]\n', r"line 2: expected an object, got \[2\]"),
        ('[{"a": 1},\n 7]', "line 2: expected an object, got 7"),
        ('[{"a": 1}\n {"a": 2}]', "line 2: not JSON"),
        ('[{"a": 1}]\n{"a": 2}', r"line 2: not JSON \(text after the array"),
        ('[{"a": 1},\n', "line 2: not JSON"),
        ("", "begins with ''"),
        ("a,b\n1,2\n", "begins with 'a'"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"rows.jsonl,? {message}"):
            list(read_rows(file))
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="rows.jsonl is not UTF-8"):
        list(read_rows(file))
    for nowhere in (tmp_path, tmp_path / "gone.json"):
        with pytest.raises(ValueError, match="is not a file"):
            list(read_rows(nowhere))


def test_bad_rows_are_given_where_they_are_counted(tmp_path):
    (tmp_path / "a").write_text('{"a": 1}\nno\n3\n{"a": 2}')
    found = list(rows_and_errors(tmp_path / "a"))
    assert [line for line, _ in found] == [1, 2, 3, 4] and [type(row) for _, row in found] == [dict, ValueError, ValueError, dict]


def test_every_file_of_rows_is_read_so(tmp_path):
    """Questions, pairs, captions, judgements: a text with U+2028 stays one, an array is as good as lines, bad rows are named."""
    for ascii_only, kind in ((False, "lines"), (True, "array")):

        def write(name, *rows, kind=kind, ascii_only=ascii_only):
            text = lines(rows, ascii_only) if kind == "lines" else json.dumps(rows)
            (tmp_path / name).write_text(text, encoding="utf-8")
            return tmp_path / name

        asked = list(examples(write("q.jsonl", {"question": ODD, "image": "a.png"}, {"question": "?"})))
        assert [example.question for example in asked] == [ODD, "?"] and [example.id for example in asked] == ["q-1", "q-2"]
        pair = {"question": ODD, "clean": "a.png", "corrupted": "b.png", "answer": "x"}
        pairs = read_candidates(write("pairs.jsonl", pair, pair))
        assert [candidate.question for candidate in pairs] == [ODD] * 2 and [candidate.id for candidate in pairs] == ["pairs-1", "pairs-2"]
        captions = load_chair(write("c.json", {"image_id": 3, "caption": ODD}), objects={"3": ["dog"]}, check_images=False)
        assert captions[0].given == ODD
        assert read_judgements(write("j.jsonl", {"id": ODD, "correct": True}, {"id": 2, "correct": False})) == {ODD: True, "2": False}
        bad = write("bad.jsonl", {"question": "?"}, {"question": 3})
        for read in (lambda file: list(examples(file)), read_candidates, read_judgements):
            with pytest.raises(ValueError, match=r"bad.jsonl, line [12]: "):
                read(bad)
    (tmp_path / "words").write_text("dog\u2028hot, puppy\ncat", encoding="utf-8")
    assert read_synonyms(tmp_path / "words")["puppy"] == "dog\u2028hot"
