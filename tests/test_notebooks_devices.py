"""Notebooks' cells on a pretended GPU (`pretend_device`): nothing mixes devices, and nothing needs float64 there."""

from __future__ import annotations

import jupytext
import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from pretend_device import on_device, pretended
from test_notebooks import SOURCES

from analyses.saliency import METHODS
from hooked_qwen2vl import HookedQwen2VL

THERE = [source for source in SOURCES if source.stem[:2] in ("01", "02", "03", "07", "10")]


@pytest.mark.slow
@pytest.mark.parametrize("source", THERE, ids=lambda source: source.stem)
def test_its_cells_run_there(source, monkeypatch, tmp_path):
    """In one namespace, without a kernel; the model is put on the device where the notebook loads it."""
    load = HookedQwen2VL.from_pretrained
    monkeypatch.setattr(HookedQwen2VL, "from_pretrained", lambda *args, **kwargs: on_device(load(*args, **kwargs)))
    monkeypatch.setattr("analyses.saliency.METHODS", tuple(method for method in METHODS if "gradient" not in method))  # no backward there
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    cells = [cell.source for cell in jupytext.read(source).cells if cell.cell_type == "code"]
    namespace = {"__name__": "notebook"}
    with torch.no_grad(), pretended(float64=False) as device:
        for cell in cells:
            exec(compile(cell.replace("%matplotlib inline", ""), source.name, "exec"), namespace)  # noqa: S102
            plt.close("all")
    assert sum(device.operations.values()) > 20
