"""Every notebook runs from its first cell to its last on the embedded model, and shows its pictures."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import jupytext
import pytest
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parents[1] / "notebooks"
sys.path.insert(0, str(FOLDER))

from build import SOURCES, execute, write_page  # noqa: E402

NAMES = [
    "01_logit_lens", "02_where_answers_flip", "03_patching", "04_compare_with_other_models", "05_domain_neurons",
    "06_hallucination_and_grounding", "07_vision_tower", "09_steer_and_ablate", "10_what_made_this_token",
]  # fmt: skip


def test_all_are_here():
    assert [source.stem for source in SOURCES] == NAMES
    assert not list(FOLDER.glob("*.ipynb"))  # their outputs are not committed: the sources are


def findings(notebook) -> tuple[str, str]:
    """(what the text says was learnt, what the last cell printed)."""
    text = next(cell.source for cell in notebook.cells[::-1] if "**What was learnt.**" in cell.source)
    outputs = notebook.cells[-1].get("outputs", [])  # none where a text is the last
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    return " ".join(text.split()), " ".join(printed.split())


def compare_with_text(text: str, printed: str) -> None:
    """The text holds the sentences that the run printed, its numbers too, up to two units of their last digit."""
    number = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
    sentence = re.escape(re.sub(number, "#", printed)).replace(r"\#", f"({number})")
    found = re.search(sentence, text)
    assert printed and found, f"the text does not say what the run does: {printed}"
    for said, now in zip(found.groups(), re.findall(number, printed)):
        digits = len(now.partition(".")[2]) if "e" not in now else 0
        unit = 10.0**-digits if "e" not in now else float(now)
        assert abs(float(said) - float(now)) <= 2.01 * unit, f"the text says {said} where this run has {now}: {printed}"


def test_a_number_that_is_not_the_runs_is_found():
    compare_with_text("Learnt: 0.91 of 12 [0.8, 1.0].", "0.90 of 12 [0.8, 1.0].")
    for text in ("Learnt: 0.81 of 12 [0.8, 1.0].", "Learnt: nothing.", "0.90 of 12 [0.8, 1.4]."):
        with pytest.raises(AssertionError):
            compare_with_text(text, "0.90 of 12 [0.8, 1.0].")


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_it_runs_and_shows_its_pictures(source, tmp_path):
    notebook = execute(source)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    figures = [output["data"] for output in outputs if output.get("data", {}).get("text/plain", "").startswith("<Figure")]
    assert figures and all("image/png" in data for data in figures)  # a figure without a formatter is only its name
    text, printed = findings(notebook)
    if "On the embedded model:" in text:
        assert not [output for output in outputs if output.get("name") == "stderr"], "progress or warnings among the outputs"
        compare_with_text(text, printed)
    write_page(notebook, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("data:image/png") >= len(figures)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_it_asks_a_question_and_ends_with_what_was_learnt(source):
    cells = jupytext.read(source).cells
    title = cells[0].source.splitlines()[0]
    assert title.startswith("# ") and title.endswith("?")
    assert any("**What was learnt.**" in cell.source for cell in cells[-2:])
    assert "pip" in cells[1].source and 'MODEL = PUBLISHED or "scenes"' in cells[2].source  # one constant switches to another model


def test_a_cell_that_fails_fails_the_notebook(tmp_path):
    source = tmp_path / "99_broken.py"
    source.write_text("# %%\n1 / 0\n", encoding="utf-8")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(source)
