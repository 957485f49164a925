"""Domain-specific neurons: which neurons belong to a visual domain, and what switching them off costs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analyses.cli.outputs import Outputs
from analyses.cli.shared import add_model, add_out, add_run, at_least_one, check_data, finished, in_range, load_model, reports, run_options
from hooked_qwen2vl.protocols import Model

NAME = "neurons"
SOURCES = ("image", "text", "generated")
STAGES = ("ablations", "effects", "firings")
HELP = "domain-specific neurons, and what switching them off costs"
EXAMPLES = (
    "--limit 120 --test-limit 40",
    "--data domains/ --share 0.02",
    "--only-select",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--data", default="scenes", help="a folder with a folder per domain (images and questions.jsonl), or 'scenes'")
    parser.add_argument("--test", help="data to test on; default: the test split of scenes, every second image of other data")
    parser.add_argument("--limit", type=int, help="questions to select on, domains in turn (default: 500 of scenes, all of other data)")
    parser.add_argument("--test-limit", type=int, default=150, help="questions to test on, domains in turn (default 150)")
    parser.add_argument("--generate", type=int, default=4, metavar="N", help="answer tokens to generate per question (default 4)")
    parser.add_argument("--share", type=float, default=0.01, help="share of each module's neurons to select (default 0.01)")
    parser.add_argument("--quantile", type=float, default=0.95, help="quantile of firing rates that a neuron must exceed (default 0.95)")
    parser.add_argument("--sources", default="image,text,generated", help="kinds of tokens to count (default image,text,generated)")
    parser.add_argument("--seeds", type=int, default=3, help="draws of each control (default 3)")
    parser.add_argument("--only-select", action="store_true", help="only count and select; switch nothing off")
    add_run(parser, 16)
    add_out(parser)


def run(options: argparse.Namespace) -> None:
    at_least_one(options, "limit", "test_limit", "seeds", "batch_size")
    in_range(options, "generate", lambda n: n >= 0, "at least 0")
    in_range(options, "share", lambda x: 0 < x <= 1, "above 0 and at most 1")
    in_range(options, "quantile", lambda x: 0 <= x < 1, "at least 0 and below 1")
    if wrong := [source for source in options.sources.split(",") if source not in SOURCES]:
        raise ValueError(f"--sources must be some of {','.join(SOURCES)}, got {wrong[0]!r}.")
    check_data(options.data, options.test)
    from analyses.experiments.neurons import AblationExperiment, EffectExperiment, FiringExperiment
    from analyses.runs.engine import this_rank

    rank = this_rank(options.rank)  # before the model: it gives each process its GPU
    model = load_model(options)
    chosen, judged = _data(options)
    folder, how = options.out, run_options(options, rank)
    states = [FiringExperiment(model, options.generate).start(chosen, folder / "firings", **how)]
    if not options.only_select:
        states.append(EffectExperiment(model).start(chosen, folder / "effects", **how))
    if options.dry_run:
        _describe(options, model, judged, states, how)
        return
    if not all(finished(options, state) for state in states):
        return
    neurons, wanted = _select(options)
    if not options.only_select:
        states.append(AblationExperiment(model, wanted).start(judged, folder / "ablations", **how))
    if finished(options, states[-1]) and reports(options, states[0]):
        _report(options, model, neurons, wanted, judged)


def _describe(options, model, judged, states, how) -> None:
    """Prints what would be done; the number of conditions is known only when firings and effects are complete."""
    from analyses.experiments.neurons import AblationExperiment

    print("\n".join(state.describe() for state in states))
    if options.only_select:
        return
    wanted = _select(options)[1] if all(state.complete for state in states) else None
    print(AblationExperiment(model, wanted or ()).start(judged, options.out / "ablations", **how).describe())
    if wanted is None:
        print("each answered untouched and under conditions that follow from the firings and effects")
    else:
        print(f"each answered untouched and under up to {len(wanted)} conditions")


def _select(options: argparse.Namespace) -> tuple[Any, Any]:
    """(the selected neurons, the conditions to run; None with --only-select)."""
    from analyses.experiments.neurons import conditions, read_effects, read_firings

    folder = options.out
    sources = [source for source in options.sources.split(",") if options.generate or source != "generated"]
    neurons = read_firings(folder / "firings").select(options.share, options.quantile, sources)
    if options.only_select:
        return neurons, None
    return neurons, conditions(neurons, read_effects(folder / "effects", neurons.domains), options.seeds)


def _data(options: argparse.Namespace) -> tuple[Any, Any]:
    """(questions to select on, questions to test on), about different images; each can be iterated several times."""
    from analyses.data.examples import examples, spread
    from analyses.experiments.neurons import split_by_image

    if options.data == "scenes":
        return (lambda: examples("scenes:train", options.limit or 500),
                lambda: examples(options.test or "scenes:test", options.test_limit, keep_bad=True))  # fmt: skip
    if options.test:
        return (lambda: examples(options.data, options.limit, keep_bad=True),
                lambda: examples(options.test, options.test_limit, keep_bad=True))  # fmt: skip
    chosen, judged = split_by_image(examples(options.data, keep_bad=True))  # has paths, not opened images
    return spread(chosen, options.limit), spread(judged, options.test_limit)


def _report(options, model, neurons, wanted, judged) -> None:
    """Writes tables and figures of the finished runs."""
    with Outputs(options, NAME) as out:
        tables = {"neurons": neurons.to_dataframe(), "neurons_by_layer": neurons.by_layer(), "neurons_overlaps": neurons.overlaps()}
        neurons.plot(out.path("neurons_by_layer.png"))
        out.say(_selection(neurons))
        if wanted is not None:
            tables |= _experiment(options, model, neurons, wanted, judged, out)
        tables["neurons_failures"] = _failures(options.out, ("firings",) if wanted is None else STAGES, out)
        for name, table in tables.items():
            out.table(f"{name}.csv", table)


def _failures(folder: Path, stages: Sequence[str], out: Outputs) -> Any:
    """A table of the questions that failed in any run."""
    import pandas as pd

    from analyses.runs.engine import read_failures

    failures = pd.concat([read_failures(folder / name).assign(run=name) for name in stages])
    if len(failures):
        out.say(f"\n{len(failures)} questions failed, the first ({failures['id'].iloc[0]}): {failures['error'].iloc[0]}")
    return failures


def _experiment(options: Any, model: Model, neurons: Any, wanted: Any, judged: Any, out: Any) -> dict:
    """Prints and draws the effects of switching neurons off; returns the tables."""
    from analyses.data.examples import in_turn
    from analyses.experiments.max_activating import top_images, written_tokens
    from analyses.experiments.neurons import prepare, read_ablations, stream_by_layer
    from analyses.views.neurons import streams_plot

    ablations = read_ablations(options.out / "ablations")
    answered = set(ablations.outcomes["id"])
    asked: Any = judged() if callable(judged) else judged
    questions = [example for example in asked if example.id in answered]
    whole = "all" if len(neurons.modules) > 1 else next(iter(neurons.modules))
    n_read = 2 * options.batch_size
    mixed = in_turn(questions)
    some = [example for domain in neurons.domains for example in [e for e in mixed if e.domain == domain][:n_read]]
    if len(some) < len(questions):
        out.say(f"\nthe streams are read on up to {n_read} questions a domain, {len(some)} of {len(questions)}")
    off = [c for c in wanted if c.module == whole and c.seed == 0]
    streams = stream_by_layer(model, prepare(model, some, n_read), off)
    ablations.save(out.path("neurons_outcomes.safetensors"))
    out.table("neurons_outcomes.csv", ablations.to_dataframe().assign(model=ablations.model_name))
    ablations.plot(out.path("neurons_accuracy.png"))
    ablations.plot_controls(out.path("neurons_controls.png"))
    streams_plot(streams, ablations.model_name, out.path("neurons_streams.png"), whole)
    tokens = []
    for module, layer, neuron in _purest(neurons):
        top_images(model, (module, layer, neuron), questions).plot(out.path(f"neuron_{module}_{layer}_{neuron}.png"))
        if module != "vision":
            tokens.append(written_tokens(model, (module, layer, neuron)).assign(module=module, layer=layer, neuron=neuron))
    accuracy, excess = ablations.accuracy(), ablations.against_controls()
    out.say(_verdict(accuracy, excess))
    cross = ablations.cross(module=whole)
    out.say("\nchange of accuracy (rows: whose neurons are off, columns: the domain asked about)\n" + cross.round(3).to_string())
    import pandas as pd

    return {"neurons_accuracy": accuracy, "neurons_against_controls": excess, "neurons_cross": cross.reset_index(),
            "neurons_streams": streams} | ({"neurons_write": pd.concat(tokens)} if tokens else {})  # fmt: skip


def _purest(neurons) -> list[tuple[str, int, int]]:
    """The neuron with the lowest DAPE in each module."""
    table = neurons.to_dataframe().sort_values("dape_nats").drop_duplicates("module")
    return list(table[["module", "layer", "neuron"]].itertuples(index=False, name=None))


def _selection(neurons) -> str:
    """A table in text: how many neurons belong to each domain, and how specific they are."""
    from math import log

    table = neurons.to_dataframe()
    lines = [f"entropy over {len(neurons.domains)} domains is at most {log(len(neurons.domains)):.3f} nats", ""]
    lines.append(f"{'module':>10}  {'selected':>8}  {'lowest DAPE':>11}  {'highest':>8}  " + "  ".join(f"{d:>9}" for d in neurons.domains))
    for module, selection in neurons.modules.items():
        some = table[table["module"] == module]["dape_nats"]
        served = "  ".join(f"{n:9d}" for n in selection.belongs.sum((0, 1)).tolist())
        lines.append(f"{module:>10}  {len(some):8d}  {some.min():11.3f}  {some.max():8.3f}  {served}")
    return "\n".join(lines)


def _verdict(accuracy, excess) -> str:
    """Accuracies, then each selection compared with its controls over all domains, as text."""
    shown = accuracy[accuracy["module"].isin(["all", *accuracy["module"].unique()])]
    matrix = shown.pivot_table(index=["module", "selection"], columns="domain", values="accuracy", sort=False)
    lines = ["\naccuracy on a domain with its own neurons, or a control for them, off", matrix.round(3).to_string(), ""]
    for _, row in excess[excess["domain"] == "all"].iterrows():
        accuracy, nats = (_told_apart(row, column) for column in ("excess", "excess_log_prob"))
        lines.append(f"{row['module']:>10}, by {row['selection']}, against {row['control']}: accuracy {accuracy}; nats {nats}")
    return "\n".join(lines)


def _told_apart(row, column: str) -> str:
    """Cost of switching off the own neurons beyond the control's, with its interval and whether that excludes 0, as text."""
    low, high = row[f"{column}_low"], row[f"{column}_high"]
    says = "hurts more" if high < 0 else "hurts less" if low > 0 else "not told apart"
    return f"{row[column]:+.3f} [{low:+.3f}, {high:+.3f}], {says}"
