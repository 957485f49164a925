"""Attention knockout: which flows of information the answers need, and in which layers."""

from __future__ import annotations

import argparse

from analyses.cli.outputs import Outputs
from analyses.cli.shared import add_model, add_out, at_least_one, load_model

NAME = "knockout"
HELP = "block attention between parts of the prompt, layer by layer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--limit", type=int, default=100, help="questions of the embedded world (default 100)")
    parser.add_argument("--window", type=int, help="layers blocked at once (default: a quarter of the layers)")
    add_out(parser)


def run(options: argparse.Namespace) -> None:
    at_least_one(options, "limit", "window")
    from analyses.data.examples import examples
    from analyses.experiments.knockout import knockout_study

    result = knockout_study(load_model(options), examples("scenes", options.limit), options.window)
    with Outputs(options, NAME) as out:
        out.table("knockout.csv", result.to_dataframe())
        result.plot(out.path("knockout.png"))
    print(f"{result.effects.shape[-1]} items answered rightly, {result.skipped} not; window of {result.window} layers")
    for reason, n in result.left_out.items():
        print(f"left out: {n}, {reason}")
    table = result.to_dataframe().pivot(index="layer", columns="flow", values="effect_percent")[list(result.flows)]
    print(table.to_string(float_format=lambda x: f"{x:+.1f} %"))
    print("\n" + out.wrote())
