"""Activation patching between two images: a map for one pair, or recovery by span over many pairs."""

from __future__ import annotations

import argparse
from typing import Any

from analyses.cli.outputs import Outputs
from analyses.cli.shared import add_model, add_out, at_least_one, load_model, say_grids, say_pieces

NAME = "patch"
HELP = "patch activations between two images"
EXAMPLES = (
    "",
    '--image clean.jpg --corrupted other.jpg --question "What color is the car?" --answer red',
    "--activation z",
    "--data scenes --n 50",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--image", help="one pair: the clean image (default: a pair of the embedded world)")
    parser.add_argument("--corrupted", help="one pair: the corrupted image, of the same grid")
    parser.add_argument("--question", help="one pair: the question")
    parser.add_argument("--answer", help="one pair: the right answer for the clean image")
    parser.add_argument("--other", help="one pair: the right answer for the corrupted image (default: the model's answer)")
    parser.add_argument("--activation", default="resid_pre", help="resid_pre, attn_out, mlp_out, z, …, or vision_encoder.resid_pre, …")
    parser.add_argument("--direction", default="denoise", choices=("denoise", "noise"))
    parser.add_argument("--data", help="many pairs: 'scenes', or a table of pairs (see analyses.counterfactuals)")
    parser.add_argument("--n", type=int, default=200, help="pairs to keep, with --data (default 200)")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts in one forward, at most; limits the memory (default 16)")
    add_out(parser)


def run(options: argparse.Namespace) -> None:
    at_least_one(options, "n", "batch_size")
    given = [options.image, options.corrupted, options.question, options.answer]
    if options.data is not None and any(given):
        raise ValueError("--data patches many pairs; leave out --image, --corrupted, --question and --answer.")
    if options.data is None and any(given) and not all(given):
        raise ValueError("one pair needs --image, --corrupted, --question and --answer.")
    (_one if options.data is None else _many)(options)


def _one(options: argparse.Namespace) -> None:

    from analyses.counterfactuals import Candidate, check_pairs, scene_candidates
    from analyses.patching import patch_sweep, recovery
    from analyses.views.patching import RECOVERY, recovery_map, recovery_on_image
    from analyses.views.text import visible
    from hooked_qwen2vl.processor import open_image

    for image in (options.image, options.corrupted):
        if image is not None:
            open_image(image)
    model = load_model(options)
    if options.image is None:
        candidates = scene_candidates(20)
    else:
        candidates = [Candidate(options.question, options.image, options.corrupted, options.answer, options.other)]
    pairs = check_pairs(model, candidates, n=1)
    if not len(pairs):
        raise ValueError(_refused(model, candidates[0], list(pairs.reasons)))
    (pair,) = pairs
    sweep = patch_sweep(
        model, pair.clean, pair.corrupted, pair.metric, options.activation, direction=options.direction, batch_size=options.batch_size
    )
    shares = recovery(sweep)["mean_of_ratios"]
    words = model.to_str_tokens(pair.clean.tokens[0])
    cells = _cells(pair.clean)
    table = sweep.index_df.assign(metric=sweep.values.flatten().tolist(), recovery=shares.flatten().tolist())
    table.insert(2, "token", [visible(words[place], None) for place in table["pos"]])
    table.insert(3, "image_cell", [cells.get(place, "") for place in table["pos"]])
    if options.direction == "noise":
        shares = 1 - shares  # the lost share is drawn
    heads = shares.ndim == 3
    if heads:  # the strongest head at each position is drawn
        strongest = shares.abs().argmax(-1, keepdim=True)
        shares = shares.gather(-1, strongest)[..., 0]
    positions = list(dict.fromkeys(sweep.index_df["pos"]))
    layers = list(dict.fromkeys(sweep.index_df["layer"]))
    labels = [str(cells.get(place, words[place])) for place in positions]
    label = RECOVERY if options.direction == "denoise" else "share lost (0: clean, 1: corrupted)"
    what = "the share of the clean answer's margin that is " + ("recovered" if options.direction == "denoise" else "lost")
    which = ", of the head with the most at each position" if heads else ""
    title = (
        f"{pair.source.question} Clean: {pair.source.answer}; corrupted: {pair.source.other or ''}\n"
        f"{options.activation} patched: {what}{which}"
    )
    columns = [positions.index(place) for place in pair.clean.positions("image[0]").tolist()]
    grid = shares[:, columns].unflatten(-1, pair.clean.grid())
    pictures = [open_image(i).convert("RGB") for i in (pair.source.clean, pair.source.corrupted)]
    with Outputs(options, NAME, question=pair.source.question, answer=pair.source.answer, other=pair.source.other) as out:
        out.table("patch.csv", table)
        recovery_map(shares, layers, labels, f"{title}; image tokens as row,column", out.path("patch.png"), label)
        recovery_on_image(grid, layers, pictures, out.path("patch_image.png"), title=title, label=label)
        out.say(f"question: {pair.source.question}\nclean: {pair.source.answer}, logit difference {pair.clean_difference:.3f}")
        out.say(f"corrupted: {model.tokenizer.decode([pair.other_id])}, logit difference {pair.corrupted_difference:.3f}\n")
        best = table.reindex(table["recovery"].abs().sort_values(ascending=False).index).head(10)
        out.say(best.to_string(index=False, float_format=lambda x: f"{x:.3f}"))


def _cells(inputs: Any) -> dict[int, str]:
    """Position -> row,column of its image token, counted from 1."""
    rows, cols = inputs.grid()
    places = inputs.positions("image[0]").tolist()
    return {place: f"{at // cols + 1},{at % cols + 1}" for at, place in enumerate(places)}


def _refused(model: Any, candidate: Any, reasons: list[str]) -> str:
    """The error message for a pair that cannot be patched."""
    from hooked_qwen2vl.processor import open_image

    more = ""
    if any("grids" in reason for reason in reasons):
        more = ": " + say_grids(model, {str(image): open_image(image) for image in (candidate.clean, candidate.corrupted)})
    elif any("single token" in reason for reason in reasons):
        answers = [answer for answer in (candidate.answer, candidate.other) if answer and len(model.to_str_tokens(answer)) > 1]
        more = ": " + "; ".join(f"{answer!r} is {say_pieces(model, answer)}" for answer in answers) + ". Choose answers of one token."
    return f"the pair can't be patched, {', '.join(reasons)}{more or '.'}"


def _many(options: argparse.Namespace) -> None:
    from analyses.counterfactuals import check_pairs, read_candidates, scene_candidates
    from analyses.data.examples import in_turn
    from analyses.experiments.locality import locality_study

    if options.activation != "resid_pre" or options.direction != "denoise":
        raise ValueError("many pairs are patched at resid_pre, denoising: leave out --activation and --direction.")
    candidates = scene_candidates(2 * options.n) if options.data == "scenes" else in_turn(read_candidates(options.data, keep_bad=True))
    model = load_model(options)
    pairs = check_pairs(model, candidates, n=options.n)
    study = locality_study(model, pairs, options.batch_size)
    with Outputs(options, NAME) as out:
        out.table("pairs.csv", pairs.to_dataframe())
        out.table("locality.csv", study.to_dataframe())
        study.plot(out.path("locality.png"))
        if unseen := len(candidates) - len(pairs) - len(pairs.refused):
            out.say(f"{unseen} of {len(candidates)} candidates were not looked at: --n pairs were found, domains and categories in turn")
        out.say(f"{len(pairs)} pairs kept; refused: {pairs.reasons or 'none'}; {study.skipped} change the whole image\n")
        out.say("\n".join(f"{name}: {value:.4g}" for name, value in study.summary().items()) + "\n")
        table = study.to_dataframe().pivot(index="layer", columns="span", values="recovery")
        out.say(table.to_string(float_format=lambda x: f"{x:.3f}"))
