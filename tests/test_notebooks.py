"""Every notebook runs from its first cell to its last on the embedded model, and shows its pictures."""

from __future__ import annotations

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


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_it_runs_and_shows_its_pictures(source, tmp_path):
    notebook = execute(source)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    figures = [output["data"] for output in outputs if output.get("data", {}).get("text/plain", "").startswith("<Figure")]
    assert figures and all("image/png" in data for data in figures)  # a figure without a formatter is only its name
    write_page(notebook, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("data:image/png") >= len(figures)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_it_asks_a_question_and_ends_with_what_was_learnt(source):
    cells = jupytext.read(source).cells
    title = cells[0].source.splitlines()[0]
    assert title.startswith("# ") and title.endswith("?")
    assert any("**What was learnt.**" in cell.source for cell in cells[-2:])
    assert cells[1].source.startswith('MODEL = "scenes"')  # one constant switches to another model


def test_a_cell_that_fails_fails_the_notebook(tmp_path):
    source = tmp_path / "99_broken.py"
    source.write_text("# %%\n1 / 0\n", encoding="utf-8")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(source)
