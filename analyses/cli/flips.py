"""At which layers answers flip, and which heads and MLPs cause the flips: for one prompt, or a data set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from analyses.cli.outputs import Outputs
from analyses.cli.shared import add_model, add_out, add_run, at_least_one, check_data, finished, load_model, reports, run_options

NAME = "flips"
ROWS = "rows"  # folder of the run, next to the tables made from it
HELP = "at which layers the answer flips, and what causes it"
EXAMPLES = (
    '--image photo.jpg --question "What color is the car?" --answer red --candidates red,blue,green',
    "--data scenes --limit 50",
    "--data questions.jsonl --rank 0/4",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--image", action="append", default=[], help="one prompt: an image file; may be repeated")
    parser.add_argument("--question", help="one prompt: the question")
    parser.add_argument("--answer", help="one prompt: the right answer")
    parser.add_argument("--candidates", default="", help="one prompt: possible answers, separated by commas")
    parser.add_argument("--data", default="scenes", help="a data set: 'scenes', a .jsonl file or a folder (see analyses.data.examples)")
    parser.add_argument("--limit", type=int, default=200, help="questions of the data set, domains and categories in turn (default 200)")
    parser.add_argument("--components", type=int, default=2, help="components to ablate for a flip (default 2)")
    parser.add_argument("--random", type=int, default=10, help="random draws of as many components (default 10)")
    add_run(parser, 8)
    add_out(parser)


def run(options: argparse.Namespace) -> None:
    at_least_one(options, "limit", "components", "random", "batch_size")
    if options.question is not None and (options.rank or options.dry_run or options.cluster):
        raise ValueError("--rank, --cluster and --dry-run belong to a data set (--data), not to one prompt (--question).")
    if options.question is None and (options.image or options.answer):
        raise ValueError("one prompt needs --question, --answer and --image; without them a data set is followed (--data).")
    (_data_set if options.question is None else _one)(options)


def _one(options: argparse.Namespace) -> None:
    import pandas as pd

    from analyses.flip_patching import attribute_flip, component_effects
    from analyses.trajectory import answer_trajectory

    if options.answer is None:
        raise ValueError("--answer is needed: the answer to follow through the layers.")
    candidates = [candidate.strip() for candidate in options.candidates.split(",") if candidate.strip()]
    model = load_model(options)
    inputs = model.encode(model.to_inputs(options.question, images=options.image))
    item = answer_trajectory(model, inputs, options.answer, candidates, question=options.question)
    layers = item.eligible_flips if candidates else item.content_flips
    flips = [attribute_flip(model, inputs, layer, int(item.top1[layer]), int(item.top1[layer - 1])) for layer in layers]
    effects = [component_effects(model, inputs, flip) for flip in flips]
    about = {"question": options.question, "images": list(map(str, options.image)), "answer": options.answer}
    with Outputs(options, NAME, **about) as out:
        out.table("trajectory.csv", item.to_dataframe())
        out.table("summary.csv", pd.DataFrame(item.summary().items(), columns=["figure", "value"]))
        if flips:
            out.table("flip_components.csv", pd.concat([e.assign(layer=layer) for layer, e in zip(layers, effects)]))
        item.plot(out.path("trajectory.png"))
        out.say(_finding(options.question, item))
        for layer, flip, effect in zip(layers, flips, effects):
            out.say(_flip(layer, flip, effect))


def _finding(question: str, item: Any) -> str:
    """A summary of the trajectory in words."""
    L = item.n_layers
    said = f"{item.answer!r}, and the model says {item.top1_tokens[-1]!r}"
    followed = "" if item.label == item.answer else f"\nfollowed:  {item.label} (the answer begins so; its other tokens are not)"
    first = item.birth(1)
    course = "never the top token" if first is None else f"first the top token at layer {first} of {L}"
    best, last = float(item.answer_prob.max()), float(item.answer_prob[-1])
    n = len(item.content_flips)
    return (
        f"question:  {question}\nanswer:    {said}: {item.outcome}{followed}\n"
        f"course:    {course}; probability at most {best:.3f} (layer {int(item.answer_prob.argmax())}), {last:.3f} at the end\n"
        f"flips:     {len(item.flips)} changes of the top token after layer 0, {n} of them between words; the last word stands from layer {item.stability}"
    )


def _flip(layer: int, flip: Any, effects: Any) -> str:
    """One flip in words, with the two components of the largest direct attribution and the effects of ablating each."""
    most = ", ".join(f"{row.component} {row.attribution:+.2f} (ablated: {row.ablated:+.2f})" for row in effects.head(2).itertuples())
    return f"layer {layer}:   {flip.lost!r} → {flip.gained!r}, difference of logits {flip.before:+.2f} → {flip.after:+.2f}; most by {most}"


def _data_set(options: argparse.Namespace) -> None:
    check_data(options.data)
    from analyses.data.examples import examples
    from analyses.experiments.flips import FlipExperiment
    from analyses.runs.engine import this_rank

    rank = this_rank(options.rank)  # before the model: it gives each process its GPU
    experiment = FlipExperiment(load_model(options), options.components, options.random)
    rows = options.out / ROWS
    state = experiment.start(lambda: examples(options.data, options.limit, keep_bad=True), rows, **run_options(options, rank))
    if options.dry_run:
        print(state.describe())
    elif finished(options, state) and reports(options, state):
        _report(options, rows)


def _report(options: argparse.Namespace, rows: Path) -> None:
    """Writes tables and figures of a finished run."""
    from analyses.experiments.flips import read_flip_study
    from analyses.runs.engine import read_failures

    study, failures = read_flip_study(rows), read_failures(rows)
    tables = {"flips": study.flips, "trajectories": study.prompts, "flip_tests": study.summary(),
              "outcomes": study.by_category().reset_index(), "failures": failures}  # fmt: skip
    with Outputs(options, NAME) as out:
        for name, table in tables.items():
            out.table(f"{name}.csv", table)
        study.plot(out.path("flips.png"))
        study.plot_trajectories(out.path("trajectories.png"))
        out.say(tables["outcomes"].to_string(index=False, float_format=lambda x: f"{x:.2f}"))
        doubt = study.doubt()
        out.say(f"\n{doubt['wrong_with_control']:.0f} wrong answers with a control candidate: the right answer was held before in "
              f"{doubt['doubt_if_wrong']:.2f} of them, the control in {doubt['control_doubt_if_wrong']:.2f}")  # fmt: skip
        out.say(f"\n{study.skipped} questions without candidates left out; {len(study.flips)} eligible flips\n")
        if len(failures):
            out.say(f"{len(failures)} questions failed, the first ({failures['id'][0]}): {failures['error'][0]}\n")
        out.say(tables["flip_tests"].to_string(index=False, float_format=lambda x: f"{x:.3f}"))
        out.say("\nthe last layer's shift, and what norming it twice would show:")
        out.say(study.last_shift().to_string(float_format=lambda x: f"{x:.3f}"))
