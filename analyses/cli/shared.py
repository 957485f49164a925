"""What the commands share: options that several take, and where they write."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hooked_qwen2vl

if TYPE_CHECKING:
    from hooked_qwen2vl.model import HookedQwen2VL

SAMPLES = Path(hooked_qwen2vl.__file__).parent / "scenes" / "samples"


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model, --adapter, --dtype, --device."""
    parser.add_argument("--model", default="scenes", help="a Qwen2-VL folder or hub id (default: the embedded model)")
    parser.add_argument("--adapter", help="a LoRA adapter of --model, a PEFT folder or hub id, merged into its weights")
    parser.add_argument("--dtype", help="float32, bfloat16, …; default: the checkpoint's own")
    parser.add_argument("--device", help="cpu, cuda, …")


def add_out(parser: argparse.ArgumentParser) -> None:
    """--out, a folder that may not exist yet."""
    parser.add_argument("--out", type=_folder, default=Path("out"), help="folder for what is written (default: out)")


def add_run(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """--batch-size, --shard, --dry-run, of what is a run over a data set."""
    parser.add_argument("--batch-size", type=int, default=batch_size, help=f"a data set: questions in a batch (default {batch_size})")
    parser.add_argument("--shard", metavar="k/n", help="a data set: do the k-th of n shares, from 0 (see docs/data_sets.md)")
    parser.add_argument("--dry-run", action="store_true", help="a data set: say what would be done, and do nothing")


def run_options(options: argparse.Namespace, share: tuple[int, int]) -> dict[str, Any]:
    """What these options are to `Experiment.start`.

    Args:
        share: of `this_share(options.shard)`, asked before the model is loaded.
    """
    return {"batch_size": options.batch_size, "shard": share, "dry_run": options.dry_run}


def finished(options: argparse.Namespace, state: Any) -> bool:
    """Whether a run is complete: processes launched together wait until it is, a share of --shard says what is missing."""
    if _launched(options, state):
        from analyses.runs.engine import wait_for_all

        wait_for_all(state)
        return True
    if not state.complete:
        total = state.plan["part"].nunique()
        print(f"{len(state.done)} of {total} parts are in {state.out}: once all are there, the same command goes on.")
    return state.complete


def reports(options: argparse.Namespace, state: Any) -> bool:
    """Whether this process makes the tables of a finished run: the first of those launched together."""
    return not _launched(options, state) or state.share[0] == 0


def _launched(options: argparse.Namespace, state: Any) -> bool:
    return state.share[1] > 1 and options.shard is None


def _folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a file: expected a folder.")
    return path


def load_model(options: argparse.Namespace) -> HookedQwen2VL:
    """The model that the options name."""
    from hooked_qwen2vl.model import HookedQwen2VL

    return HookedQwen2VL.from_pretrained(options.model, dtype=options.dtype, device=options.device, adapter=options.adapter)


def out_folder(options: argparse.Namespace) -> Path:
    """--out, made: called when there is something to write."""
    options.out.mkdir(parents=True, exist_ok=True)
    return options.out


def at_least_one(options: argparse.Namespace, *names: str) -> None:
    """Counts must be positive, where they are given.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}.")
