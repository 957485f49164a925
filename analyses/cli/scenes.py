"""A contact sheet of the embedded world: pictures with their questions, answers and boxes."""

from __future__ import annotations

import argparse

from analyses.cli.outputs import Outputs
from analyses.cli.shared import add_out, at_least_one

NAME = "scenes"
HELP = "a contact sheet of the embedded world"
EXAMPLES = ("--n 16 --seed 3",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=int, default=9, help="number of pictures (default 9)")
    parser.add_argument("--seed", type=int, default=0)
    add_out(parser)


def run(options: argparse.Namespace) -> None:
    from hooked_qwen2vl.scenes import contact_sheet, sample

    at_least_one(options, "n")
    with Outputs(options, NAME) as out:
        contact_sheet(sample(options.n, seed=options.seed), out.path("scenes.png"))
