"""Domain-specific neurons: which neurons serve one visual domain, and what switching them off costs."""

from __future__ import annotations

import argparse
from pathlib import Path

from .shared import add_model, add_out, at_least_one, load_model, out_folder

NAME = "neurons"
HELP = "domain-specific neurons, and what switching them off costs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--data", default="scenes", help="a folder with a folder per domain (images and questions.jsonl), or 'scenes'")
    parser.add_argument("--test", help="data to judge on; default: of scenes the test split, of other data every second image")
    parser.add_argument("--limit", type=int, help="questions to select on (default: 500 of scenes, all of other data)")
    parser.add_argument("--test-limit", type=int, default=150, help="questions to judge on (default 150)")
    parser.add_argument("--generate", type=int, default=4, metavar="N", help="answer tokens counted an example, at most (default 4)")
    parser.add_argument("--share", type=float, default=0.01, help="of each module's neurons to select (default 0.01)")
    parser.add_argument("--quantile", type=float, default=0.95, help="of all firing rates, to be exceeded (default 0.95)")
    parser.add_argument("--sources", default="image,text,generated", help="whose tokens count (default image,text,generated)")
    parser.add_argument("--seeds", type=int, default=3, help="draws of each control (default 3)")
    parser.add_argument("--batch", type=int, default=16, help="prompts in one forward (default 16)")
    parser.add_argument("--counts", type=Path, help="file of counts to make or go on with (default: OUT/firings.safetensors, made anew)")
    parser.add_argument("--only-select", action="store_true", help="count and select; switch nothing off")
    add_out(parser)


def run(options: argparse.Namespace) -> None:
    at_least_one(options, "test_limit", "seeds", "batch")
    from analyses.domain_neurons import count_firings

    model = load_model(options)
    chosen, judged = _data(options)
    out, written = out_folder(options), []
    counts = count_firings(model, chosen, batch_size=options.batch, generate=options.generate, path=options.counts)
    counts.save(out / "firings.safetensors")
    sources = [source for source in options.sources.split(",") if options.generate or source != "generated"]
    neurons = counts.select(options.share, options.quantile, sources)
    tables = {"neurons": neurons.to_dataframe(), "neurons_by_layer": neurons.by_layer(), "neurons_overlaps": neurons.overlaps()}
    neurons.plot(out / "neurons_by_layer.png")
    written += ["firings.safetensors", "neurons_by_layer.png"]
    print(_selection(neurons))
    if not options.only_select:
        tables |= _experiment(options, model, neurons, chosen, judged, out, written)
    for name, table in tables.items():
        table.to_csv(out / f"{name}.csv", index=False)
    print("\n" + "\n".join(f"wrote {out / name}" for name in [*written, *(f"{name}.csv" for name in tables)]))


def _data(options: argparse.Namespace) -> tuple[list, list]:
    """(questions to select on, questions to judge on), on different images."""
    from analyses.data import examples
    from analyses.neuron_experiment import split_by_image

    if options.data == "scenes":
        return list(examples("scenes:train", options.limit or 500)), list(examples(options.test or "scenes:test", options.test_limit))
    if options.test:
        return list(examples(options.data, options.limit)), list(examples(options.test, options.test_limit))
    chosen, judged = split_by_image(examples(options.data))
    return chosen[: options.limit], judged[: options.test_limit]


def _experiment(options, model, neurons, chosen, judged, out, written) -> dict:
    """Switches off, answers, draws; returns the tables."""
    from analyses.neuron_experiment import ablate, ablation_effects, conditions, prepare, stream_by_layer
    from analyses.neuron_pictures import top_images, written_tokens
    from analyses.views.neurons import streams_plot

    effects = ablation_effects(model, chosen, neurons.domains, list(neurons.modules), options.batch)
    batches, wanted = prepare(model, judged, 2 * options.batch), conditions(neurons, effects, options.seeds)
    ablations = ablate(model, batches, wanted)
    whole = "all" if len(neurons.modules) > 1 else next(iter(neurons.modules))
    first = {batch.domain: batch for batch in reversed(batches)}.values()  # enough for means by layer
    streams = stream_by_layer(model, list(first), [c for c in wanted if c.module == whole and c.seed == 0])
    ablations.save(out / "neurons_outcomes.csv")
    ablations.plot(out / "neurons_accuracy.png")
    ablations.plot_controls(out / "neurons_controls.png")
    streams_plot(streams, ablations.model_name, out / "neurons_streams.png", whole)
    written += ["neurons_outcomes.csv", "neurons_accuracy.png", "neurons_controls.png", "neurons_streams.png"]
    tokens = []
    for module, layer, neuron in _purest(neurons):
        name = f"neuron_{module}_{layer}_{neuron}.png"
        top_images(model, (module, layer, neuron), judged).plot(out / name)
        written.append(name)
        if module != "vision":
            tokens.append(written_tokens(model, (module, layer, neuron)).assign(module=module, layer=layer, neuron=neuron))
    accuracy, excess = ablations.accuracy(), ablations.against_controls()
    print(_verdict(accuracy, excess))
    cross = ablations.cross(module=whole)
    print("\nchange of accuracy (rows: whose neurons are off, columns: the domain asked about)\n" + cross.round(3).to_string())
    import pandas as pd

    return {"neurons_accuracy": accuracy, "neurons_against_controls": excess, "neurons_cross": cross.reset_index(),
            "neurons_streams": streams} | ({"neurons_write": pd.concat(tokens)} if tokens else {})  # fmt: skip


def _purest(neurons) -> list[tuple[str, int, int]]:
    """The neuron of lowest DAPE of each module."""
    table = neurons.to_dataframe().sort_values("dape_nats").drop_duplicates("module")
    return list(table[["module", "layer", "neuron"]].itertuples(index=False, name=None))


def _selection(neurons) -> str:
    """How many neurons serve each domain, and how specific they are."""
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
    """Accuracies, then each selection against its controls over all domains, in words."""
    shown = accuracy[accuracy["module"].isin(["all", *accuracy["module"].unique()])]
    matrix = shown.pivot_table(index=["module", "selection"], columns="domain", values="accuracy", sort=False)
    lines = ["\naccuracy on a domain with its own neurons, or a control for them, off", matrix.round(3).to_string(), ""]
    for _, row in excess[excess["domain"] == "all"].iterrows():
        low, high = row["excess_low"], row["excess_high"]
        says = "hurts more than" if high < 0 else "hurts less than" if low > 0 else "is not told apart from"
        log_low, log_high = row["excess_log_prob_low"], row["excess_log_prob_high"]
        lines.append(
            f"{row['module']:>10}, by {row['selection']}: {says} {row['control']} "
            f"({row['excess']:+.3f} [{low:+.3f}, {high:+.3f}] accuracy; "
            f"{row['excess_log_prob']:+.3f} [{log_low:+.3f}, {log_high:+.3f}] nats)"
        )
    return "\n".join(lines)
