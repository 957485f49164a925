"""Limits: spread over domains and categories, drawn by a seed, and what they leave out is said."""

from __future__ import annotations

import json
import warnings
from collections import Counter

import pytest

from analyses.data.examples import Example, LeftOut, examples, in_batches, in_turn, spread


def data(**sizes: int) -> list[Example]:
    """Sorted by domain, and in each by category, as files often are."""
    return [Example(f"{d}{i}", "what?", "", (), d, "xy"[2 * i // n]) for d, n in sizes.items() for i in range(n)]


def test_a_limit_is_spread_over_domains_and_categories():
    items = data(a=40, b=8, c=100)
    with pytest.warns(LeftOut, match=r"30 of 148 are kept \(domain: a 11 of 40, b 8 of 8, c 11 of 100\)"):
        kept = spread(items, 30)
    assert Counter((item.domain, item.category) for item in kept) == {
        ("a", "x"): 6, ("a", "y"): 5, ("b", "x"): 4, ("b", "y"): 4, ("c", "x"): 6, ("c", "y"): 5,
    }  # fmt: skip
    assert len({item.id for item in kept}) == 30
    with pytest.warns(LeftOut):
        assert spread(items, 12) == kept[:12]  # a larger limit adds
        assert spread(items, 30) == kept  # the same draw
        other = spread(items, 30, seed=1)
    assert {item.id for item in other} != {item.id for item in kept}
    numbers = [int(item.id[1:]) for item in kept if item.domain == "c" and item.category == "x"]
    assert max(numbers) > 12  # not the first of its group
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert spread(items, None) == items == spread(items, 148)  # nothing left out, nothing said, in its order
        assert sorted(item.id for item in in_turn(items)) == sorted(item.id for item in items)


def test_what_is_left_out_is_said_in_one_line():
    with pytest.warns(LeftOut, match=r"1 of 3 are kept \(domain: a 1 of 1, b 0 of 1, none 0 of 1\)"):
        spread([*data(a=1, b=1), Example("q", "what?", "")], 1)
    many = [Example(str(i), "what?", "", (), f"d{i}") for i in range(40)]
    with pytest.warns(LeftOut, match="d11 1 of 1, and 28 more"):
        spread(many, 20)
    with pytest.warns(LeftOut, match="2 of 5 are kept$|2 of 5 are kept[.]"):
        spread([Example(str(i), "what?", "") for i in range(5)], 2)


def test_limits_of_a_folder_and_of_questions(tmp_path):
    for domain in ("ants", "bats"):
        (tmp_path / domain).mkdir()
        lines = [json.dumps({"question": "what?", "answer": "red"}) for _ in range(6)]
        (tmp_path / domain / "questions.jsonl").write_text("\n".join(lines))
    for found in (tmp_path, list(examples(tmp_path))):
        with pytest.warns(LeftOut, match="5 of 12 are kept"):
            assert Counter(e.domain for e in examples(found, 5)) == {"ants": 3, "bats": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(examples(tmp_path, 12))) == 12 == len(list(examples(examples(tmp_path))))
        assert Counter(e.domain for e in examples("scenes", 10)).most_common()[-1][1] == 2  # five domains in turn; no end
    for bad in (tmp_path, data(a=3), "scenes"):
        with pytest.raises(ValueError, match="limit must be at least 1"):
            list(examples(bad, 0))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        list(in_batches([1], 0))
