"""Which heads and MLPs the answers to a data set need: ablates each, or a set of heads and random sets, or searches for a small set."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from analyses.cli.outputs import Outputs
from analyses.cli.shared import (
    add_model,
    add_out,
    add_run,
    at_least_one,
    check_data,
    finished,
    in_range,
    load_model,
    reports,
    run_options,
)

NAME = "ablate"
HELP = "which heads and MLPs the answers need"
EXAMPLES = (
    "--limit 30",
    "--parts mlps --how zero",
    "--heads 3.1,4.0",
    "--find --share 0.8",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--data", default="scenes", help="'scenes', a .jsonl file or a folder (see analyses.data.examples)")
    parser.add_argument("--limit", type=int, default=100, help="questions, domains and categories in turn (default 100)")
    parser.add_argument(
        "--parts", default="heads", choices=("heads", "attentions", "mlps", "layers"), help="ablate each of these (default heads)"
    )
    parser.add_argument("--heads", type=_heads, metavar="L.H,…", help="instead: this set of heads, such as 3.1,4.0, and random sets")
    parser.add_argument("--find", action="store_true", help="instead: search for the smallest set of heads that carries the answers")
    parser.add_argument(
        "--share", type=float, default=0.8, help="--find: of the answers' log-probability that the set must carry (default 0.8)"
    )
    parser.add_argument("--how", default="mean", choices=("mean", "zero", "resample"), help="what a part is replaced by (default mean)")
    parser.add_argument(
        "--reference", default="scenes:train", help="questions that means and resampled tokens are taken from (default scenes:train)"
    )
    parser.add_argument("--random", type=int, default=20, help="random sets of as many heads (default 20)")
    parser.add_argument("--seed", type=int, default=0)
    add_run(parser, 16)
    add_out(parser)


def _heads(text: str) -> list[tuple[int, int]]:
    if not re.fullmatch(r"\d+\.\d+(,\d+\.\d+)*", text):
        raise argparse.ArgumentTypeError(f"expected heads as layer.head, separated by commas, such as 3.1,4.0, got {text!r}.")
    pairs = (pair.split(".") for pair in text.split(","))
    return [(int(layer), int(head)) for layer, head in pairs]


def run(options: argparse.Namespace) -> None:
    at_least_one(options, "limit", "random", "batch_size")
    in_range(options, "share", lambda share: 0 < share <= 1, "in 0..1, and more than 0")
    if options.find and options.heads:
        raise ValueError("--heads names a set, --find searches for one: give one of them.")
    if options.find and (options.rank or options.dry_run or options.cluster):
        raise ValueError("--rank, --cluster and --dry-run belong to a run over a data set: --find searches in one process; leave them out.")
    check_data(options.data, options.reference if options.how != "zero" else None)
    (_find if options.find else _effects)(options)


def _effects(options: argparse.Namespace) -> None:
    from analyses.data.examples import examples
    from analyses.experiments.ablation import Ablation, every_part, reference_of, sets_of_heads
    from analyses.runs.engine import this_rank

    rank = this_rank(options.rank)  # before the model: it gives each process its GPU
    model = load_model(options)
    kind = "heads" if options.heads else options.parts
    parts = sets_of_heads(model, options.heads, options.random, options.seed) if options.heads else every_part(model, kind)
    reference = None if options.how == "zero" else reference_of(model, options.reference, kind=kind, seed=options.seed)
    experiment = Ablation(model, parts, options.how, reference, options.seed)
    rows = options.out / NAME
    state = experiment.start(lambda: examples(options.data, options.limit, keep_bad=True), rows, **run_options(options, rank))
    if options.dry_run:
        print(state.describe())
    elif finished(options, state) and reports(options, state):
        _report(options, rows)


def _report(options: argparse.Namespace, rows: Path) -> None:
    """Writes tables and a figure of a finished run."""
    from analyses.experiments.ablation import Ablation
    from analyses.runs.engine import read_failures

    result, failures = Ablation.read(rows), read_failures(rows)
    table = result.to_dataframe()
    with Outputs(options, NAME) as out:
        out.table("ablation.csv", table)
        out.table("failures.csv", failures)
        result.plot(out.path("ablation.png"))
        overall = table[table["category"] == "all"].drop(columns=["category", "images"])
        out.say(overall.head(20).to_string(index=False, float_format=lambda x: f"{x:+.3f}"))
        if len(failures):
            out.say(f"\n{len(failures)} questions failed, the first ({failures['id'][0]}): {failures['error'][0]}")


def _find(options: argparse.Namespace) -> None:
    from analyses.cli.shared import readable
    from analyses.data.examples import examples, image_key
    from analyses.experiments.ablation import find_heads, reference_of

    questions = readable(examples(options.data, options.limit, keep_bad=True))
    images = list(dict.fromkeys(map(image_key, questions)))
    half = set(images[::2])
    search, held_out = ([q for q in questions if (image_key(q) in half) == own] for own in (True, False))
    model = load_model(options)
    reference = None if options.how == "zero" else reference_of(model, options.reference, seed=options.seed)
    result = find_heads(
        model,
        search,
        held_out,
        options.share,
        options.how,
        reference,
        n_random=options.random,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    with Outputs(options, NAME) as out:
        out.table("heads_search.csv", result.search)
        out.table("heads.csv", result.to_dataframe())
        result.plot(out.path("heads.png"))
        out.say(result.search.to_string(index=False, float_format=lambda x: f"{x:.3f}"))
        about = result.summary()
        out.say(
            f"\n{about['heads']} heads carry {about['share']:.0%} [{about['share_low']:.0%}, {about['share_high']:.0%}] of the answers' log-probability on "
            f"{result.n_held_out} held-out questions; {options.random} random sets of as many: {about['random_mean']:.0%}, at most "
            f"{about['random_largest']:.0%}."
        )
