"""Compares the model with transformers' own, stage by stage."""

from __future__ import annotations

import argparse

from analyses.cli.shared import add_model, load_model

# Said wherever pixels are compared: which of transformers' two image processors these are.
PIXELS = (
    "pixels: both models are given this package's, which equal those of transformers' PIL image processor. With torchvision\n"
    "installed transformers resizes in torch by default, up to 2 grey levels apart (with random weights up to 6 % of the logits'\n"
    'spread); AutoProcessor.from_pretrained(…, backend="pil") gives the same pixels as here. torchvision is {} here.\n'
)

NAME = "check"
HELP = "compare with transformers' own model, stage by stage"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.set_defaults(dtype="float32")


def run(options: argparse.Namespace) -> int:
    import transformers
    from transformers.utils import is_torchvision_available

    from hooked_qwen2vl.checkpoint import open_checkpoint
    from hooked_qwen2vl.selfcheck import self_check

    model = load_model(options)
    checkpoint = open_checkpoint(options.model, adapter=options.adapter)
    folder = checkpoint.folder
    architecture = getattr(transformers, model.cfg.original_architecture)
    reference = architecture.from_pretrained(folder, dtype=model.cfg.dtype).eval().to(model.cfg.device)
    if checkpoint.adapter not in (None, folder):  # one in the folder itself transformers applies
        from peft import PeftModel

        reference = PeftModel.from_pretrained(reference, checkpoint.adapter).merge_and_unload()
    print(PIXELS.format("installed" if is_torchvision_available() else "not installed"))
    table = self_check(model, reference)
    print(table.to_string(index=False, float_format=lambda x: f"{x:.1e}"))
    failed = table[~table["ok"]]
    if len(failed):
        first = failed.iloc[0]
        print(f"\nfirst stage that differs: {first['stage']}, by {first['error']:.1e} (tolerance {first['tolerance']:.0e})")
        return 1
    print("\nevery stage agrees with the reference")
    return 0
