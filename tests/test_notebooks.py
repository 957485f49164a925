"""Every notebook runs from its first cell to its last on the embedded model, and shows its pictures."""

from __future__ import annotations

import re
import sys
from itertools import chain, zip_longest
from pathlib import Path

import jupytext
import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_output

FOLDER = Path(__file__).parents[1] / "notebooks"
sys.path.insert(0, str(FOLDER))

import build  # noqa: E402
from build import SOURCES, execute, printed_findings, write_findings, write_page  # noqa: E402

NAMES = [
    "01_logit_lens", "02_where_answers_flip", "03_patching", "04_compare_with_other_models", "05_domain_neurons",
    "06_hallucination_and_grounding", "07_vision_tower", "08_base_and_tuned", "09_steer_and_ablate", "10_what_made_this_token",
]  # fmt: skip
WIDE = 100  # characters that a page shows of a table without a scroll bar


def test_all_are_here():
    assert [source.stem for source in SOURCES] == NAMES
    assert not list(FOLDER.glob("*.ipynb"))  # their outputs are not committed: the sources are


def findings(notebook) -> tuple[str, str]:
    """(what the text says was learnt, what the last cell printed)."""
    text = next(cell.source for cell in notebook.cells[::-1] if "**What was learnt.**" in cell.source)
    return " ".join(text.split()), " ".join(printed_findings(notebook).split())


def compare_with_text(text: str, printed: str) -> None:
    """The text holds the sentences that the run printed, its numbers too: integers exactly, decimals up to one unit of the last digit."""
    assert not re.search(r"\d[eE][-+]?\d", printed), f"a size of rounding noise is no finding: {printed}"
    number = r"-?\d+(?:\.\d+)?"
    sentence = re.escape(re.sub(number, "#", printed)).replace(r"\#", f"({number})")
    found = re.search(sentence, text)
    assert printed and found, f"the text does not say what the run does: {printed}"
    for said, now in zip(found.groups(), re.findall(number, printed)):
        digits = len(now.partition(".")[2])
        unit = 10.0**-digits if digits else 0.0
        assert abs(float(said) - float(now)) <= 1.01 * unit, f"the text says {said} where this run has {now}: {printed}"


def test_a_number_that_is_not_the_runs_is_found():
    compare_with_text("Learnt: 0.91 of 12 [0.8, 1.0].", "0.90 of 12 [0.8, 1.0].")
    for text in ("0.92 of 12 [0.8, 1.0].", "Learnt: nothing.", "0.90 of 12 [0.8, 1.2].", "0.90 of 13 [0.8, 1.0]."):
        with pytest.raises(AssertionError):
            compare_with_text(text, "0.90 of 12 [0.8, 1.0].")
    with pytest.raises(AssertionError, match="rounding noise"):
        compare_with_text("at most 2e-06", "at most 2e-06")


def refuse_unreadable_tables(html: str) -> None:
    """Fails for a table (as pandas writes it) that is wider than a page, or has NaN or no rows."""
    for table in BeautifulSoup(html, "html.parser").select("table.dataframe"):
        rows = [[cell.get_text() for cell in row.select("th, td")] for row in table.select("tr")]
        width = sum(max(map(len, column)) + 2 for column in zip_longest(*rows, fillvalue=""))
        assert width <= WIDE, f"{width} characters: {rows[:2]}"
        assert table.select("td") and not {"NaN", "<NA>"} & set(chain(*rows)), rows


@pytest.mark.parametrize("table", [{"a": ["x" * 99]}, {"a": [1.0, float("nan")]}, {"a": []}], ids=["wide", "NaN", "empty"])
def test_tables_that_cannot_be_read_are_found(table):
    refuse_unreadable_tables(pd.DataFrame({"a": ["x" * 40], "b": [0.5]}).to_html())
    with pytest.raises(AssertionError), pd.option_context("display.max_colwidth", None):
        refuse_unreadable_tables(pd.DataFrame(table).to_html())


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_it_runs_and_shows_its_pictures(source, tmp_path):
    notebook = execute(source)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    figures = [output["data"] for output in outputs if output.get("data", {}).get("text/plain", "").startswith("<Figure")]
    assert figures and all("image/png" in data for data in figures)  # a figure without a formatter is only its name
    assert not [output for output in outputs if output.get("name") == "stderr"], "progress or warnings among the outputs"
    for output in outputs:
        refuse_unreadable_tables(output.get("data", {}).get("text/html", ""))
    compare_with_text(*findings(notebook))
    write_page(notebook, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("data:image/png") >= len(figures)
    assert ("circuitsvis" in "".join(cell.source for cell in notebook.cells)) == any(
        "CircuitsVis" in output.get("data", {}).get("text/html", "") for output in outputs
    )


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_it_asks_a_question_and_ends_with_what_was_learnt(source):
    cells = jupytext.read(source).cells
    title = cells[0].source.splitlines()[0]
    assert title.startswith("# ") and title.endswith("?")
    assert cells[-2].source.startswith("**What was learnt.** On the embedded model:\n\n") and cells[-1].cell_type == "code"
    assert len(build.PARAGRAPH.findall(source.read_text(encoding="utf-8"))) == 1  # what --findings writes anew
    assert "pip" in cells[1].source and 'MODEL = PUBLISHED or "scenes"' in cells[2].source  # one constant switches to another model


def test_some_show_circuitsvis():
    assert sum("circuitsvis" in source.read_text(encoding="utf-8") for source in SOURCES) >= 3


class Loaded(Exception):  # noqa: N818
    """Instead of a model."""


@pytest.mark.parametrize("hosted", [None, "COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"])
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_where_and_how_its_model_is_loaded(source, hosted, gpu, monkeypatch):
    """The published model on a hosted GPU, on that GPU; else the embedded one; both in float32, in which cells assert sums."""

    def load(name, dtype=None, device=None, **_):
        raise Loaded(name, dtype, device)

    for name in ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    if hosted:
        monkeypatch.setenv(hosted, "some")
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("hooked_qwen2vl.HookedQwen2VL.from_pretrained", load)
    setup, loading = (cell.source.replace("%matplotlib inline", "") for cell in jupytext.read(source).cells[1:3])
    namespace = {"__name__": "notebook"}
    with pytest.raises(Loaded) as loaded, torch.set_grad_enabled(True):
        exec(f"{setup}\n{loading}", namespace)  # noqa: S102
    if source.stem.startswith("08"):  # its adapter belongs to the embedded model, which is float32
        assert loaded.value.args == ("scenes", None, None)
    else:
        assert loaded.value.args == (("Qwen/Qwen2-VL-2B-Instruct", "float32", "cuda") if hosted and gpu else ("scenes", "float32", "cpu"))


def test_a_cell_that_fails_fails_the_notebook(tmp_path):
    source = tmp_path / "99_broken.py"
    source.write_text("# %%\n1 / 0\n", encoding="utf-8")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(source)


SMALL = """# %% [markdown]
# # What is it?

# %% [markdown]
# **What was learnt.** On the embedded model:
#
# It is 1.00 of 3.
# It was another sentence.
#
# What follows stays.

# %%
print("It is 2.00 of 3, more than half.")
"""


@pytest.mark.parametrize("small", [SMALL, SMALL.replace("#\n# What follows stays.\n\n", "")], ids=["more text", "the next cell"])
def test_findings_are_written_anew(small, tmp_path, monkeypatch, capsys):
    source = tmp_path / "98_small.py"
    source.write_text(small, encoding="utf-8")
    monkeypatch.setattr(build, "SOURCES", [source])
    build.main(["98", "--out", str(tmp_path)])
    assert source.read_text(encoding="utf-8") == small  # only where asked for
    build.main(["98", "--out", str(tmp_path), "--findings"])
    expected = small.replace("# It is 1.00 of 3.\n# It was another sentence.", "# It is 2.00 of 3, more than half.")
    assert source.read_text(encoding="utf-8") == expected
    page = (tmp_path / "98_small.html").read_text(encoding="utf-8")
    assert "<script" not in page and not re.search(r"""(src|href)=["']https?:""", page)  # it opens without network
    assert jupytext.read(tmp_path / "98_small.ipynb").cells[-1].outputs  # what Colab and Kaggle open
    assert "It was another" not in page and page.count("It is 2.00 of 3, more than half.") == 3  # the text, the code, its output


@pytest.mark.parametrize(
    ("printed", "text", "words"),
    [
        ("", SMALL, "must print the findings"),
        ("One.\n\nTwo.", SMALL, "must print the findings"),
        ("One.", SMALL.replace("On the embedded model", "Here"), "found 0"),
        ("One.", SMALL + SMALL, "found 2"),
    ],
)
def test_findings_that_have_no_place_change_nothing(tmp_path, printed, text, words):
    source = tmp_path / "98_small.py"
    source.write_text(text, encoding="utf-8")
    notebook = jupytext.read(source)
    notebook.cells[-1].outputs = [new_output("stream", name="stdout", text=printed)]
    with pytest.raises(ValueError, match=words):
        write_findings(source, notebook)
    assert source.read_text(encoding="utf-8") == text
