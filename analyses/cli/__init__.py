"""The command line `hooked-qwen2vl`: one module of this package per command.

Each module has NAME, HELP and EXAMPLES, `add_arguments(parser)` and `run(options)`, which returns an exit code, or None for 0.
Slow imports are inside functions, so that --help is quick.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from functools import partial
from typing import Any

from analyses.cli import (
    ablate,
    check,
    compare,
    explain,
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
from analyses.cli.outputs import take_place
from analyses.cli.shared import check_model
from hooked_qwen2vl.malloc import keep_freed_memory
from hooked_qwen2vl.version import __version__

COMMANDS = (lens, explore, explain, flips, patch, knockout, ablate, ground, hallucination, neurons, compare, check, scenes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0; 1 if a check failed; 2 for invalid input, with a message; 130 if interrupted.

    If the reader of its output stops reading (`| head`), the command still runs to its end and writes its files.
    """
    keep_freed_memory()
    with _tolerant_streams(), warnings.catch_warnings():
        warnings.showwarning = partial(_say, set())
        try:
            options = _parser().parse_args(arguments)
            check_model(options)
            if hasattr(options, "out"):
                options.line = shlex.join(["hooked-qwen2vl", *map(str, sys.argv[1:] if arguments is None else arguments)])
                name = next(command.NAME for command in COMMANDS if command.run is options.run)
                take_place(options, name, (command.NAME for command in COMMANDS))
            return options.run(options) or 0
        except KeyboardInterrupt as error:
            print(f"\nhooked-qwen2vl: {error if str(error) else 'interrupted: nothing of this command was written.'}", file=sys.stderr)
            return 130
        except Exception as error:
            if (said := _paragraph(error)) is None:
                raise  # an error of the program
            print(f"hooked-qwen2vl: {said}", file=sys.stderr)
            return 2


# Libraries that read the user's files; their errors are about those files.
_READERS = ("huggingface_hub", "jinja2", "PIL", "pyarrow", "safetensors", "yaml")
_ADVICE = {errno.ENOSPC: ": make room, and start the same command again", errno.EACCES: ": choose another place"}


def _paragraph(error: Exception) -> str | None:
    """The message for an error that the user can fix; None for an error of the program."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror.lower()}{_ADVICE.get(error.errno or 0, '')}."
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return f"the memory is not enough ({_first(error)}): take a smaller --batch-size, --dtype bfloat16, or smaller images."
    if type(error).__module__.split(".")[0] in _READERS:
        return f"something that was read is not as expected ({type(error).__name__}: {_first(error)})."
    return None


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


class _Stream:
    """A text stream that ignores a closed pipe, and escapes characters that its encoding lacks.

    Attributes:
        unread: whether the pipe was closed by its reader.
    """

    def __init__(self, stream: Any):
        self.stream, self.unread = stream, False

    def write(self, text: str) -> int:
        coding = getattr(self.stream, "encoding", None) or "utf-8"
        with self._unless_unread():
            self.stream.write(text.encode(coding, "backslashreplace").decode(coding))
        return len(text)

    def flush(self) -> None:
        with self._unless_unread():
            self.stream.flush()

    @contextmanager
    def _unless_unread(self) -> Iterator[None]:
        if self.unread:  # the buffered text would be written again
            self.stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            self.unread = False
        try:
            yield
        except BrokenPipeError:
            self.unread = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def _tolerant_streams() -> Iterator[None]:
    kept = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = streams = tuple(map(_Stream, kept))
    try:
        yield
    finally:
        for stream, own in zip(streams, kept):
            stream.flush()
            if stream.unread or stream.stream is not own:  # else Python reports buffered text at exit
                with suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), own.fileno())
        sys.stdout, sys.stderr = kept


def _say(said: set[str], message: Warning | str, category: type[Warning], filename: str, lineno: int, *more: Any) -> None:
    """Prints `LeftOut` and `UnknownColumns` warnings once (a run reads its data twice), other warnings as Python does."""
    from analyses.data.examples import LeftOut
    from analyses.data.schema import UnknownColumns

    if issubclass(category, (LeftOut, UnknownColumns)):
        if str(message) not in said:
            print(message)
        said.add(str(message))
    else:
        print(warnings.formatwarning(message, category, filename, lineno), file=sys.stderr, end="")


class _Parser(argparse.ArgumentParser):
    """For a misspelt option or command, prints the usage of the command and the nearest name."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:  # else the main parser would report them, with its own usage
            nearest = self._nearest(unknown[0].partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{nearest}")
        return found, unknown

    def error(self, message: str) -> Any:
        if wrong := re.match(r"argument \S+: invalid choice: '(.*?)' \(choose from (.*)\)", message, re.DOTALL):
            message += self._nearest(wrong[1], re.findall(r"'(.*?)'", wrong[2]))
        super().error(message)

    def _nearest(self, word: str, names: Iterable[str]) -> str:
        near = get_close_matches(word, [*names], n=1, cutoff=0.5)
        return f"; did you mean {near[0]}?" if near else ""


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hooked-qwen2vl", description="Qwen2-VL, Qwen2.5-VL and Qwen3-VL, opened as TransformerLens opens GPT-2.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for command in COMMANDS:
        examples = "examples:\n" + "\n".join(f"  hooked-qwen2vl {command.NAME} {line}".rstrip() for line in command.EXAMPLES)
        subparser = subparsers.add_parser(
            command.NAME,
            help=command.HELP,
            description=command.__doc__,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser
