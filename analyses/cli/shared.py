"""Options and checks that several commands use."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hooked_qwen2vl
from hooked_qwen2vl.moved import warn_of

if TYPE_CHECKING:
    from analyses.runs.cluster import Cluster
    from hooked_qwen2vl.model import HookedQwen2VL
    from hooked_qwen2vl.protocols import Model

SAMPLES = Path(hooked_qwen2vl.__file__).parent / "scenes" / "samples"


class Renamed(argparse.Action):
    """An option under the name that it had in earlier versions; `new` is its current name."""

    def __init__(self, *args: Any, new: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.new = new

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        warn_of(str(option_string), self.new)
        setattr(namespace, self.dest, values)


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model, --adapter, --dtype, --device."""
    parser.add_argument(
        "--model",
        default="scenes",
        help="a folder or hub id of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL (default: the embedded model)",
    )
    parser.add_argument("--adapter", help="a LoRA adapter of --model, a PEFT folder or hub id, merged into its weights")
    dtypes = ("float32", "bfloat16", "float16", "float64")
    parser.add_argument("--dtype", choices=dtypes, metavar="NAME", help=f"{', '.join(dtypes)}; default: the checkpoint's own")
    parser.add_argument("--device", help="cpu, cuda, …")


def add_out(parser: argparse.ArgumentParser) -> None:
    """--out, a folder that need not exist yet, and --open."""
    parser.add_argument("--out", type=_folder, help="output folder (default: a new one below out/)")
    parser.add_argument("--open", action="store_true", help="open the folder's index.html in the browser at the end")


def add_run(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """The options of a run over a data set: --batch-size, --rank, --cluster, --dry-run."""
    parser.add_argument("--batch-size", type=int, default=batch_size, help=f"a data set: questions in a batch (default {batch_size})")
    parser.add_argument("--shard", dest="rank", action=Renamed, new="--rank", help=argparse.SUPPRESS)
    parser.add_argument(
        "--rank", metavar="k/n", help="a data set: this is process k = 0..n-1 of n that share the run (see docs/data_sets.md)"
    )
    parser.add_argument(
        "--cluster",
        metavar="auto|ADDRESS",
        help="a data set: run it on the nodes of a Ray cluster, this machine's or the one at the address (see docs/scale.md)",
    )
    parser.add_argument("--cluster-cpus", type=int, default=1, metavar="N", help="CPUs per worker, if the cluster has no GPU (default 1)")
    parser.add_argument("--dry-run", action="store_true", help="a data set: print what would be done, and do nothing")


def run_options(options: argparse.Namespace, rank: tuple[int, int]) -> dict[str, Any]:
    """The arguments of `Experiment.start` for these options.

    Args:
        rank: from `this_rank(options.rank)`, called before the model is loaded.
    Raises:
        ValueError: a rank together with --cluster.
    """
    return {"batch_size": options.batch_size, "rank": rank, "dry_run": options.dry_run, "cluster": _cluster(options, rank)}


def _cluster(options: argparse.Namespace, rank: tuple[int, int]) -> Cluster | None:
    if options.cluster is None:
        return None
    if rank != (0, 1):
        raise ValueError("--cluster hands the whole run out to its nodes: drop --rank, and start one process without a launcher.")
    at_least_one(options, "cluster_cpus")
    from analyses.runs.cluster import Cluster

    return Cluster(options.cluster, partial(_on_a_node, argparse.Namespace(**{**vars(options), "run": None})), options.cluster_cpus)


def _on_a_node(options: argparse.Namespace) -> HookedQwen2VL:
    """Loads the model on a worker: on --device, else on the GPU that Ray gave to the worker, else on the CPU."""
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else None)
    return _loaded(options, device)


def finished(options: argparse.Namespace, state: Any) -> bool:
    """Whether a run is complete. Processes launched together wait for it; a process with --rank prints what is missing."""
    if _launched(options, state):
        from analyses.runs.engine import wait_for_all

        wait_for_all(state)
        return True
    if not state.complete:
        total = state.plan["part"].nunique()
        print(f"{len(state.done)} of {total} shards are in {state.out}: once all are there, the same command goes on.")
    return state.complete


def reports(options: argparse.Namespace, state: Any) -> bool:
    """Whether this process writes the tables of a finished run; of processes launched together only the first does."""
    return not _launched(options, state) or state.rank[0] == 0


def _launched(options: argparse.Namespace, state: Any) -> bool:
    return state.rank[1] > 1 and options.rank is None


def _folder(text: str) -> Path:
    path = Path(text)
    with _as_argument_error():
        if path.exists() and not path.is_dir():
            raise argparse.ArgumentTypeError(f"{path} is a file: expected a folder.")
        _refuse_unwritable(path)
    return path


@contextmanager
def _as_argument_error() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"no such name can be written ({getattr(error, 'strerror', None) or error}).") from error


def _refuse_unwritable(folder: Path) -> None:
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there} is a file: nothing can be written below it.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{there} may not be written to: choose another --out.")


def check_model(options: argparse.Namespace) -> None:
    """Checks, before anything heavy is imported, that there may be a checkpoint at --model and --adapter.

    Raises:
        ValueError: there is none.
    """
    from hooked_qwen2vl.checkpoint import local_checkpoint

    for name in (getattr(options, "model", None), getattr(options, "adapter", None)):
        if name is not None:
            local_checkpoint(name)


def load_model(options: argparse.Namespace) -> HookedQwen2VL:
    """Loads the model of the options.

    Raises:
        ValueError: no such device, no such checkpoint, or files that cannot be loaded for any reason.
    """
    on_cluster = getattr(options, "cluster", None) is not None  # this process only plans; the nodes use the device
    return _loaded(options, None if on_cluster else options.device)


def _loaded(options: argparse.Namespace, device: str | None) -> HookedQwen2VL:
    check_device(device)
    from hooked_qwen2vl.model import HookedQwen2VL

    with loading(options.model):
        return HookedQwen2VL.from_pretrained(options.model, dtype=options.dtype, device=device, adapter=options.adapter)


def single_token(model: HookedQwen2VL, name: str, text: str) -> int:
    """The id of a text that is one token.

    Raises:
        ValueError: the text is several tokens.
    """
    from hooked_qwen2vl.prompt_text import text_ids

    ids = text_ids(model.tokenizer, text)
    if len(ids) != 1:
        raise ValueError(f"{name} {text!r} is {say_pieces(model, text)}: expected one token, such as the first of them.")
    return ids[0]


def say_pieces(model: HookedQwen2VL, text: str) -> str:
    """The tokens of a text, for error messages."""
    pieces = list(map(repr, model.to_str_tokens(text)))
    return f"{len(pieces)} tokens, {' + '.join(pieces[:8] + ['…'] * (len(pieces) > 8))}"


def say_grids(model: Model, images: dict[str, Any]) -> str:
    """An error message about images whose grids differ: sizes, grids, and what to do.

    Args:
        images: name -> PIL image.
    """
    sizes = {name: (image.size, model.to_inputs("?", images=[image]).grid()) for name, image in images.items()}
    said = "; ".join(f"{name} has {w}×{h} pixels and gives {rows}×{cols} image tokens" for name, ((w, h), (rows, cols)) in sizes.items())
    (first, ((w, h), _)), *_ = sizes.items()
    return f"{said}. Resize the other to {w}×{h}, the size of {first}, or crop both alike."


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Context for loading a model: turns any error into a ValueError that names the model, as damaged files can raise anything.

    Raises:
        ValueError: for all errors but interruptions and MemoryError.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # noqa: B036 (a Rust panic is not an Exception)
        why = " ".join(str(error).split())[:500].rstrip(".") or "no reason is given"
        if type(error) is ValueError and str(name) in str(error):
            raise
        if type(error) is ValueError:
            raise ValueError(f"{name}: {why}.") from error
        raise ValueError(
            f"{name} cannot be loaded ({type(error).__name__}: {why}): its files are damaged, or not those of a supported model."
        ) from error


def check_device(device: str | None) -> None:
    """Checks that torch can make a tensor on a device.

    Raises:
        ValueError: it cannot.
    """
    if device is None:
        return
    import torch

    try:
        torch.empty(0, device=device)
    except Exception as error:
        why = str(error).strip().split("\n")[0][:200].rstrip(".")
        raise ValueError(f"--device {device} cannot be used here ({why}): expected cpu, or an accelerator that this torch sees.") from error


def in_range(options: argparse.Namespace, name: str, inside: Callable[[Any], bool], expected: str) -> None:
    """Checks the value of an option, if it is given.

    Raises:
        ValueError: `inside(value)` is False.
    """
    value = getattr(options, name)
    if value is not None and not inside(value):
        raise ValueError(f"--{name.replace('_', '-')} must be {expected}, got {value}.")


def at_least_one(options: argparse.Namespace, *names: str) -> None:
    """Checks that options are at least 1, if they are given.

    Raises:
        ValueError: one is less than 1.
    """
    for name in names:
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}.")


def readable(questions: Iterable[Any]) -> list[Any]:
    """The valid questions; prints why others are left out.

    Raises:
        ValueError: no question is valid.
    """
    from analyses.data.examples import problem_of

    kept, problems = [], []
    for question in questions:
        (problems if (problem := problem_of(question)) else kept).append(problem or question)
    for problem in problems:
        print(f"left out: {problem}")
    if not kept:
        raise ValueError(f"no question can be read, the first: {problems[0]}")
    return kept


def check_data(*names: str | None) -> None:
    """Checks, before a model is loaded, that these data sets (see `data.examples`) have questions.

    Raises:
        ValueError: one has none.
    """
    from analyses.data.examples import examples

    for name in names:
        if name is not None:
            next(examples(name, 1 if name.split(":")[0] == "scenes" else None, keep_bad=True))
