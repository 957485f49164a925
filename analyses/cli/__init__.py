"""The command `hooked-qwen2vl`: a module of this package for each of its commands.

Each module has NAME and HELP, `add_arguments(parser)` and `run(options)`, which returns an exit code or None for 0.
Heavy imports wait until a command runs, so that --help is quick.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

from analyses.cli import (
    check,
    compare,
    explore,
    flips,
    ground,
    hallucination,
    knockout,
    lens,
    neurons,
    patch,
    scenes,
)

COMMANDS = (lens, explore, flips, patch, knockout, ground, hallucination, neurons, compare, check, scenes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0; 1 when a check failed; 2 with a paragraph on what was wrong
    with the input."""
    options = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = partial(_say, set())
        try:
            return options.run(options) or 0
        except (ValueError, OSError) as error:
            print(f"hooked-qwen2vl: {error}", file=sys.stderr)
            return 2


def _say(said: set[str], message: Warning | str, category: type[Warning], filename: str, lineno: int, *more: Any) -> None:
    """What a limit leaves out is printed, once, though a run goes through its data twice; other warnings as Python shows them."""
    from analyses.data.examples import LeftOut

    if issubclass(category, LeftOut):
        if str(message) not in said:
            print(message)
        said.add(str(message))
    else:
        print(warnings.formatwarning(message, category, filename, lineno), file=sys.stderr, end="")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hooked-qwen2vl", description="Qwen2-VL, opened as TransformerLens opens GPT-2.")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.NAME, help=command.HELP, description=command.__doc__)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser

