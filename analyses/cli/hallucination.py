"""Which score separates the model's right answers from its hallucinated ones, on a local copy of a benchmark."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from analyses.cli.outputs import Outputs
from analyses.cli.shared import add_model, add_out, add_run, at_least_one, finished, in_range, load_model, reports, run_options
from hooked_qwen2vl.protocols import Model

NAME = "hallucination"
HELP = "how well scores detect hallucinated answers, by category"
EXAMPLES = (
    "--limit 300",
    "--data pope:coco_pope_random.json --images val2014",
    "--data amber:AMBER --judgements verdicts.jsonl",
)
ROWS = "rows"  # folder of the run, next to the tables made from it
KINDS = ("scenes", "pope", "hqh", "amber", "chair", "mmhal")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--data", default="scenes", metavar="KIND:PATH",
        help="pope:FILE, hqh:DIR, amber:DIR, chair:FILE, mmhal:FILE, or scenes (the embedded world's test split; default)",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, default=1000, help="questions, categories in turn (default 1000)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="the folder of the images (default: as the benchmark has it)")
    parser.add_argument("--objects", type=Path, metavar="FILE", help='chair: {"image_id": ["dog", …]}, the objects in each image')
    parser.add_argument("--synonyms", type=Path, metavar="FILE", help="chair: one object per line, 'person, girl, boy'")
    parser.add_argument("--judgements", type=Path, metavar="FILE", help='by an external judge: JSON lines {"id": …, "correct": true}')
    parser.add_argument("--skip-bad", action="store_true", help="leave out bad rows and list them, instead of stopping")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="default: every score of analyses.answer_scores")
    parser.add_argument("--image-layer", type=int, help="contextual lens: layer of the image tokens (default round(0.5 L))")
    parser.add_argument("--text-layer", type=int, help="contextual lens: layer of the answer (default round(0.75 L))")
    parser.add_argument("--sweep", type=int, default=0, metavar="N", help="scenes: choose both layers on N items of the validation split")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--n-boot", type=int, default=1000, help="resamples for the intervals (default 1000)")
    add_run(parser, 8)
    add_out(parser)


def run(options: argparse.Namespace) -> None:
    at_least_one(options, "limit", "max_new_tokens", "n_boot", "batch_size")
    in_range(options, "sweep", lambda n: n >= 0, "at least 0")
    if options.sweep and options.dry_run:
        raise ValueError("--sweep runs the model to choose what --dry-run would describe: pass one of them.")
    from analyses.data.benchmarks import read_synonyms
    from analyses.experiments.hallucination import check_methods, read_judgements
    from analyses.runs.engine import this_rank

    check_methods(options.methods)
    rank = this_rank(options.rank)  # before the model: it gives each process its GPU
    items, name = _load(options)
    vocabulary = read_synonyms(options.synonyms) if options.synonyms else None
    judgements = read_judgements(options.judgements) if options.judgements else None
    folder = options.out
    for problem in items.problems:
        print(f"left out: {problem}")
    if all(item.images for item in items):
        state = _run(options, items, folder / ROWS, vocabulary, rank)
        if options.dry_run:
            print(state.describe())
            return
        if not (finished(options, state) and reports(options, state)):
            return
    elif options.dry_run:
        print("the captions come with the data and have no images: they are judged, and no model is run")
        return
    with Outputs(options, NAME, data=name) as out:
        if items[0].benchmark == "chair":
            _chair(items, vocabulary, out)
        if all(item.images for item in items):
            _report(options, items, name, judgements, folder / ROWS, out)
        elif items.problems:
            out.table("failures.csv", _problems(items))


def _run(options: argparse.Namespace, items: Any, rows: Path, vocabulary: Any, rank: tuple[int, int]) -> Any:
    """Runs the questions that have no result yet."""
    from analyses.experiments.hallucination import HallucinationExperiment

    model = load_model(options)
    layers = _layers(options, model)
    experiment = HallucinationExperiment(model, options.methods, vocabulary, options.max_new_tokens, *layers)
    return experiment.start(items, rows, **run_options(options, rank))


def _load(options: argparse.Namespace) -> tuple[Any, str]:
    """(questions, name of the data set)."""
    from analyses.data.benchmarks import LOADERS, load_scenes

    kind, _, path = options.data.partition(":")
    if kind not in KINDS or (kind != "scenes" and not path):
        raise ValueError(f"--data must be scenes or one of {', '.join(f'{k}:PATH' for k in KINDS[1:])}, got {options.data!r}.")
    if kind == "scenes":
        return load_scenes(options.limit, path or "test"), f"scenes:{path or 'test'}"
    if kind == "chair" and options.synonyms is None:
        raise ValueError("chair needs --synonyms FILE, a line an object: 'person, girl, boy'.")
    more = {"objects": options.objects} if kind == "chair" else {}
    items = LOADERS[kind](path, images=options.images, skip_bad=options.skip_bad, **more)
    return items.spread(options.limit), f"{kind}:{Path(path).stem}"


def _layers(options: argparse.Namespace, model: Model) -> tuple[int | None, int | None]:
    """The contextual lens's layers: as given, or chosen on the validation split."""
    if not options.sweep:
        return options.image_layer, options.text_layer
    from analyses.data.benchmarks import load_scenes
    from analyses.experiments.hallucination import choose_layers

    if not options.data.startswith("scenes") or options.data.endswith("validation"):
        raise ValueError("--sweep is for the embedded world's test split, whose validation split is apart; give --image-layer.")
    if options.image_layer is not None or options.text_layer is not None:
        raise ValueError("--sweep chooses the layers: pass it, or --image-layer and --text-layer, not both.")
    sweep = choose_layers(model, load_scenes(options.sweep, "validation"), options.max_new_tokens)
    best = float(sweep.auroc[sweep.image_layer, sweep.text_layer])
    print(
        f"layers by {sweep.n_items} validation answers ({sweep.n_items - sweep.n_correct} hallucinated): image layer "
        f"{sweep.image_layer}, text layer {sweep.text_layer}, AUROC there {best:.3f}"
    )
    return sweep.image_layer, sweep.text_layer


def _problems(items: Any) -> Any:
    """The bad rows of the data as a table of failures."""
    import pandas as pd

    return pd.DataFrame({"item": None, "id": "", "batch": None, "error": list(items.problems)})


def _report(options: argparse.Namespace, items: Any, name: str, judgements: Any, rows: Path, out: Outputs) -> None:
    """Prints the table of methods × categories; writes claims, metrics and figures."""
    import pandas as pd

    from analyses.experiments.hallucination import read_hallucinations
    from analyses.runs.engine import read_failures

    result, failures = read_hallucinations(rows, name, judgements, options.n_boot), read_failures(rows)
    out.table("failures.csv", failures if not items.problems else pd.concat([failures, _problems(items)]))
    if len(failures):
        out.say(f"{len(failures)} questions have no answer, the first ({failures['id'][0]}): {failures['error'][0]}")
    claims = result.claims.assign(correct=result.claims["correct"].astype(object).where(result.claims["correct"].notna()))
    out.table("claims.csv", claims.assign(correct=claims["correct"].fillna("needs a judge")))
    _yes_no(items, result, out)
    unjudged = int(result.claims["correct"].isna().sum())
    if unjudged:
        out.say(f"{unjudged} of {len(result.claims)} answers need a judge: give its verdicts with --judgements.")
    for column, what in (("cut", "were cut at --max-new-tokens"), ("other_tokens", "are scored with other tokens than generated")):
        if number := int(result.claims[column].sum()):
            out.say(f"{number} answers {what}.")
    if failed := int((result.claims["error"] != "").sum()):
        out.say(f"{failed} answers have no scores; claims.csv says why.")
    if result.judged["correct"].nunique() < 2:
        out.say("Right and hallucinated answers are both needed to compare scores; no table is made.")
        return
    out.say(
        f"\nAUROC, {100 * result.level:.0f}% bootstrap intervals (clusters: {result.cluster}); higher tells right from hallucinated better, 0.5 not at all\n"
    )
    out.say(result.table().T.to_string())
    if few := result.few():
        out.say(f"\nfewer than 300 hallucinated answers, so wide intervals: {', '.join(f'{k} ({n})' for k, n in few.items())}")
    out.path("results.md").write_text(result.markdown(), encoding="utf-8")
    out.table("metrics.csv", result.to_dataframe())
    result.plot(out.path("roc.png"))
    result.plot_scores(out.path("scores.png"))
    result.plot_intervals(out.path("intervals.png"))


def _yes_no(items: Any, result: Any, out: Outputs) -> None:
    """Accuracy, precision, recall, F1 and yes-rate of the yes/no questions of a benchmark that defines them."""
    from analyses.data.benchmarks import YES_NO, yes_no_metrics

    answers = dict(zip(result.claims["key"], result.claims["answer"]))
    asked = [item for item in items if item.judge == YES_NO and item.id in answers]
    if not asked:
        return
    positive = "no" if asked[0].benchmark == "amber" else "yes"
    table = yes_no_metrics(asked, [answers[item.id] for item in asked], positive)
    out.say(f"\nyes/no answers, positive class {positive}\n\n{table.round(3).to_string(index=False)}")
    out.table("yes_no.csv", table)


def _chair(items: Any, vocabulary: Any, out: Outputs) -> None:
    """Prints and writes CHAIRs and CHAIRi; ValueError if the objects in an image are not known."""
    from analyses.data.benchmarks import OBJECTS, chair

    if any(item.judge != OBJECTS for item in items):
        raise ValueError('chair needs to know what is truly there: --objects FILE, or "objects" in every row.')
    found = chair(items, vocabulary)
    out.say(found.to_dataframe().round(4).to_string(index=False))
    out.table("chair.csv", found.to_dataframe())
    out.table("chair_mentions.csv", found.mentions)
