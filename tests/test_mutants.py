"""The mutation tool itself: what it samples, what it changes, and that it tells a watched line from an unwatched one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "mutants"))

import mutants  # noqa: E402
from modules import TESTS  # noqa: E402

SOURCE = '''"""A module."""

LIMIT: int | None = 3


def clipped(values: list[int], most: int | None = LIMIT + 1) -> list[int] | None:
    if len(values) > 5:
        raise ValueError(f"at most {2 + 3}")
    return [min(value, most) for value in values if value >= 0]
'''


def test_annotations_and_errors_texts_are_left_alone():
    found = mutants.all_mutants(SOURCE)
    changes = {mutants.change(SOURCE, mutants.mutated(SOURCE, mutant)) for mutant in found}
    assert all("int |" not in change.split("→")[1] or "int | None" in change.split("→")[1] for change in changes)
    assert {mutant.line for mutant in found} == {3, 6, 7, 9}
    swapped = [mutants.mutated(SOURCE, mutant) for mutant in found if mutant.operator == "swap-name"]
    assert swapped == [SOURCE.replace("min(", "max(")]
    bounds = [mutants.mutated(SOURCE, mutant) for mutant in found if "GtE_Gt" in mutant.operator]
    assert SOURCE.replace("value >= 0", "value > 0").replace(" ", "") in [code.replace(" ", "") for code in bounds]


def test_every_mutant_compiles_and_differs():
    for mutant in mutants.all_mutants(SOURCE):
        code = mutants.mutated(SOURCE, mutant)
        compile(code, "module", "exec")
        assert code != SOURCE and mutants.change(SOURCE, code).count(" → ") == 1


def test_a_sample_follows_from_its_seed_and_visits_every_place_first():
    found = mutants.all_mutants(SOURCE)
    places = {(mutant.line, mutant.column) for mutant in found}
    one, again, other = (mutants.sample(found, len(places), seed) for seed in (0, 0, 1))
    assert one == again != other
    assert {(mutant.line, mutant.column) for mutant in one} == places
    assert mutants.sample(found, len(places) + 2, 0)[: len(places)] == one
    everything = mutants.sample(found, 10**6, 0)
    assert len(everything) == len(found) == len({mutant.name for mutant in everything})


@pytest.fixture
def small_tree(tmp_path, monkeypatch):
    """A module of which one line is tested and one is not, in place of this repository."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "watched.py").write_text("def double(x):\n    return x * 2\n\n\ndef half(x):\n    return x / 2\n")
    (tmp_path / "tests" / "test_watched.py").write_text("from watched import double\n\ndef test(): assert double(3) == 6\n")
    for name in ("import_what_is_slow", "copy_tree"):
        monkeypatch.setattr(mutants, name, lambda *given: None)
    tree = tmp_path / "out" / "watched" / "tree"
    for file in ("watched.py", "tests/test_watched.py"):
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        (tree / file).write_text((tmp_path / file).read_text())
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "OUT", tmp_path / "out")
    monkeypatch.setitem(TESTS, "watched.py", "test_watched")
    return tmp_path


@pytest.mark.slow
def test_what_is_tested_is_killed_and_the_rest_survives(small_tree, monkeypatch, capsys):
    before = (small_tree / "watched.py").read_text()
    found = mutants.judge("watched.py", 6, 0)
    assert {mutant.outcome for mutant in found if mutant.line == 2} == {"killed"}
    assert {mutant.outcome for mutant in found if mutant.line == 6} == {"survived"}
    assert (small_tree / "watched.py").read_text() == before  # only the copy is changed
    table = (small_tree / "out" / "watched" / "table.md").read_text()
    assert mutants.summary(found) in table and table.count("| killed |") + table.count("| survived |") == 6

    ran = []
    real = mutants.run_tests
    monkeypatch.setattr(mutants, "run_tests", lambda *given: ran.append(1) or real(*given))
    assert mutants.judge("watched.py", 6, 0) == found and not ran  # all is known
    results = small_tree / "out" / "watched" / "results.jsonl"
    results.write_text("".join(results.read_text().splitlines(keepends=True)[:-2]) + '{"operator": "cut o')
    assert [one.outcome for one in mutants.judge("watched.py", 6, 0)] == [one.outcome for one in found] and len(ran) == 3
    (small_tree / "tests" / "test_watched.py").write_text("def test(): pass\n")
    (small_tree / "out" / "watched" / "tree" / "tests" / "test_watched.py").write_text("def test(): pass\n")
    (small_tree / "out" / "watched" / "tree" / "watched.py").write_text(before)
    assert {mutant.outcome for mutant in mutants.judge("watched.py", 6, 0)} == {"survived"}  # other tests: all anew


def test_what_cannot_be_judged_is_refused(small_tree):
    with pytest.raises(ValueError, match="names no tests for 'other.py'"):
        mutants.judge("other.py", 3, 0)
    (small_tree / "out" / "watched" / "tree" / "tests" / "test_watched.py").write_text("def test(): assert False\n")
    with pytest.raises(ValueError, match="fail without any fault"):
        mutants.judge("watched.py", 3, 0)


def test_every_module_and_test_named_is_there():
    for module, tests in TESTS.items():
        assert (mutants.ROOT / module).is_file(), module
        for name in tests.split():
            assert (mutants.ROOT / "tests" / f"{name}.py").is_file(), name
