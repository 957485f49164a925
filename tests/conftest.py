"""Shared fixtures: one seed for every test, tiny models and the prompts they are run on."""

from __future__ import annotations

import os
import random

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, each with a core: what it starts has one, too
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

# `make test-shapes`: shapes and types in the signatures of these modules are checked at every call; before anything imports them.
CHECKED = {
    "hooked_qwen2vl": "attention block layers positions rope tl_weights vision vision_qwen25 vision_qwen3",
    "analyses": "contextual_lens direct_path edge_attribution embedding_lens flip_patching knockout logit_lens patched_runs patching "
    "project_away trajectory tuned_lens common.attention common.rectangles common.vocabulary",
}
if os.environ.get("CHECK_SHAPES"):
    install_import_hook([f"{package}.{name}" for package, names in CHECKED.items() for name in names.split()], "beartype.beartype")

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_hf, tiny_processor

from hooked_qwen2vl import HookedQwen2VL, Inputs


def pytest_configure(config):
    """pytest-randomly draws the order alone: the seeds are `seed`'s, so that a test meets the same numbers in every run."""
    config.option.randomly_reset_seed = False


def pytest_terminal_summary(terminalreporter, config):
    """How to have this order again; -q hides the plugin's own line."""
    if drawn := getattr(config.option, "randomly_seed", None):
        terminalreporter.write_line(f"this order again: -p randomly --randomly-seed={drawn}")


@pytest.fixture(autouse=True)
def seed():
    random.seed(0)
    torch.manual_seed(0)
    np.random.seed(0)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def processor():
    return tiny_processor()


@pytest.fixture(scope="session")
def hf():
    return tiny_hf()


@pytest.fixture(scope="session")
def model(hf, processor):
    """A hooked model over the session's reference model; tests must leave it as they found it."""
    return HookedQwen2VL.from_hf(hf, processor)


@pytest.fixture(scope="session")
def scenes():
    """The embedded model."""
    return HookedQwen2VL.from_pretrained("scenes")


def prompts(model: HookedQwen2VL) -> dict[str, Inputs]:
    """One of every kind of batch."""
    wide, tall, small = picture(140, 84, 1), picture(60, 115, 2), picture(56, 56, 3)
    frames = [picture(84, 56, 10 + i) for i in range(5)]
    return {
        "image": model.to_inputs("what is this?", images=[wide]),
        "text": model.to_inputs("red or blue, the thing"),
        "two images": model.to_inputs("are they the same?", images=[wide, tall]),
        "video": model.to_inputs("what happens?", videos=[frames]),
        "image and video": model.to_inputs("is it there?", images=[tall], videos=[frames]),
        "batch": model.to_inputs(
            ["what?", "which of the two is red?", "the red thing", "go on"],
            images=[[wide], [tall, small], [], [small]],
            answers=["blue", None, "red red", None],
        ),
        "no template": model.to_inputs("the red", images=[tall], template=False),
    }


@pytest.fixture(scope="session")
def batches(model):
    return prompts(model)
