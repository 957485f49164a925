"""Notebooks' cells on a pretended GPU (`pretend_device`): nothing mixes devices, and in float32 nothing needs float64 there."""

from __future__ import annotations

import re

import jupytext
import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from pretend_device import needs_torch, on_device, pretended
from test_notebooks import SOURCES

from analyses.saliency import METHODS
from hooked_qwen2vl import HookedQwen2VL

pytestmark = needs_torch
HALF = [source for source in SOURCES if source.stem[:2] in ("01", "07", "09")]  # 02 and 03 assert equalities of float32

FEWER = {"12": "2", "16": "4", "40": "10", "120": "20", "480": "60"}  # items, pairs, questions: every operation is slower there


def run_there(source, monkeypatch, folder, dtype: torch.dtype) -> None:
    """In one namespace, without a kernel; the model is put on the device where the notebook loads it."""
    load = HookedQwen2VL.from_pretrained
    monkeypatch.setattr(HookedQwen2VL, "from_pretrained", lambda *args, **kwargs: on_device(load(*args, **(kwargs | {"dtype": dtype}))))
    monkeypatch.setattr("analyses.saliency.METHODS", tuple(method for method in METHODS if "gradient" not in method))  # no backward there
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.chdir(folder)
    matplotlib.use("agg")
    cells = [cell.source for cell in jupytext.read(source).cells if cell.cell_type == "code"]
    namespace = {"__name__": "notebook"}
    with torch.no_grad(), pretended(float64=dtype != torch.float32) as device:
        for cell in cells:
            plain = re.sub(r"^%matplotlib inline$", "", cell, flags=re.MULTILINE)
            fewer = re.sub(r"^([A-Z]+ = )(\d+)$", lambda line: line[1] + FEWER.get(line[2], line[2]), plain, flags=re.MULTILINE)
            exec(compile(fewer, source.name, "exec"), namespace)  # noqa: S102
            plt.close("all")
    assert sum(device.operations.values()) > 20


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_its_cells_run_there(source, monkeypatch, tmp_path):
    run_there(source, monkeypatch, tmp_path, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("source", HALF, ids=lambda source: source.stem)
def test_its_cells_run_there_in_half_precision(source, monkeypatch, tmp_path):
    run_there(source, monkeypatch, tmp_path, torch.bfloat16)
