"""Compares the model with transformers' model of the same checkpoint, stage by stage."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from analyses.cli.shared import add_model, check_device, load_model

# Printed with every comparison: which of transformers' two image processors the pixels equal.
PIXELS = (
    "pixels: both models are given this package's, which equal those of transformers' PIL image processor. With torchvision\n"
    "installed transformers resizes in torch by default, up to 2 grey levels apart (with random weights up to 6 % of the logits'\n"
    'spread); AutoProcessor.from_pretrained(…, backend="pil") gives the same pixels as here. torchvision is {} here.\n'
)

NAME = "check"
HELP = "compare with transformers' own model, stage by stage"
EXAMPLES = (
    "",
    "--model Qwen/Qwen2-VL-2B-Instruct",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write one JSON file to send back: versions, machine, hashes, every stage in float32 and bfloat16 (or in --dtype), tokens "
        "per second (see docs/verified.md)",
    )


def run(options: argparse.Namespace) -> int:
    from transformers.utils import is_torchvision_available

    print(PIXELS.format("installed" if is_torchvision_available() else "not installed"))
    if options.report is not None:
        return _report(options)
    from hooked_qwen2vl.selfcheck import self_check

    table = self_check(*_models(options, options.dtype or "float32"))
    print(table.to_string(index=False, float_format=lambda x: f"{x:.1e}"))
    failed = table[~table["ok"]]
    if len(failed):
        first = failed.iloc[0]
        print(f"\nfirst stage that differs: {first['stage']}, by {first['error']:.1e} (tolerance {first['tolerance']:.0e})")
        return 1
    print("\nevery stage agrees with the reference")
    return 0


def _models(options: argparse.Namespace, dtype: str) -> tuple[Any, Any]:
    """(this package's model, transformers' model of the same files, dtype and device)."""
    import transformers

    from hooked_qwen2vl.checkpoint import open_checkpoint

    model = load_model(argparse.Namespace(**{**vars(options), "dtype": dtype}))
    checkpoint = open_checkpoint(options.model, adapter=options.adapter)
    architecture = getattr(transformers, model.cfg.original_architecture)
    reference = architecture.from_pretrained(checkpoint.folder, dtype=model.cfg.dtype).eval().to(model.cfg.device)
    if checkpoint.adapter not in (None, checkpoint.folder):  # transformers itself applies an adapter in the folder
        from peft import PeftModel

        reference = PeftModel.from_pretrained(reference, checkpoint.adapter).merge_and_unload()
    return model, reference


def _report(options: argparse.Namespace) -> int:
    from hooked_qwen2vl.checkpoint import open_checkpoint
    from hooked_qwen2vl.files import whole_file
    from hooked_qwen2vl.verification import DTYPES, report

    check_device(options.device)
    folder = open_checkpoint(options.model, adapter=options.adapter).folder
    dtypes = DTYPES if options.dtype is None else (options.dtype,)
    found = report(options.model, Path(folder), partial(_models, options), dtypes)
    with whole_file(options.report) as file:
        Path(file).write_text(json.dumps(found, indent=1, allow_nan=False, default=str), encoding="utf-8")
    for one in found["runs"]:
        print(f"{one['dtype']}: {'every stage agrees with the reference' if one['ok'] else one.get('error', 'a stage differs')}")
    print(f"wrote {options.report}")
    return 0 if found["ok"] else 1
