"""What the commands share: options that several take, and where they write."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..model import HookedQwen2VL

SAMPLES = Path(__file__).parents[1] / "scenes" / "samples"


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model, --dtype, --device."""
    parser.add_argument("--model", default="scenes", help="a Qwen2-VL folder or hub id (default: the embedded model)")
    parser.add_argument("--dtype", help="float32, bfloat16, …; default: the checkpoint's own")
    parser.add_argument("--device", help="cpu, cuda, …")


def add_out(parser: argparse.ArgumentParser) -> None:
    """--out, a folder that may not exist yet."""
    parser.add_argument("--out", type=_folder, default=Path("out"), help="folder for what is written (default: out)")


def _folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a file: expected a folder.")
    return path


def load_model(options: argparse.Namespace) -> HookedQwen2VL:
    """The model that the options name."""
    from ..model import HookedQwen2VL

    return HookedQwen2VL.from_pretrained(options.model, dtype=options.dtype, device=options.device)


def out_folder(options: argparse.Namespace) -> Path:
    """--out, made: called when there is something to write."""
    options.out.mkdir(parents=True, exist_ok=True)
    return options.out


def at_least_one(options: argparse.Namespace, *names: str) -> None:
    """Counts must be positive.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}.")
