"""Which image tokens each token of an answer depends on: hides image tokens one at a time and measures the answer's probability."""

from __future__ import annotations

import argparse
import json

from analyses.cli.outputs import Outputs
from analyses.cli.shared import SAMPLES, add_model, add_out, at_least_one, load_model

NAME = "explain"
HELP = "which image tokens each token of the answer depends on"
EXAMPLES = (
    "",
    '--image photo.jpg --question "What color is the car?" --open',
    '--image photo.jpg --question "What is this?" --method occlusion',
)
METHODS = ("knockout", "occlusion", "integrated gradients", "attention × gradient", "rollout", "attention")  # of analyses.saliency


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--image", action="append", default=[], help="an image file; may be repeated")
    parser.add_argument("--question", help="default: a shipped image and its question")
    parser.add_argument("--answer", help="teacher-forced; default: the model's own answer")
    parser.add_argument("--method", default="knockout", choices=METHODS, help="default knockout, which is exact; see docs/saliency.md")
    parser.add_argument("--max-new-tokens", type=int, default=20, metavar="N", help="limit for the model's own answer (default 20)")
    parser.add_argument("--batch-size", type=int, default=16, help="changed copies of the prompt in one forward (default 16)")
    add_out(parser)


def run(options: argparse.Namespace) -> None:
    images, question = options.image, options.question
    if question is None:
        if images:
            raise ValueError("an image came without a question: add --question, such as 'What is in the image?'.")
        sample = json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))[0]
        images, question = [SAMPLES / sample["image"]], sample["question"]
    elif not images:
        raise ValueError("a question came without an image: add --image FILE, there is nothing that it could depend on.")
    at_least_one(options, "max_new_tokens", "batch_size")
    from analyses.saliency import saliency
    from hooked_qwen2vl.processor import open_image

    pictures = [open_image(image) for image in images]
    model = load_model(options)
    inputs = model.encode(model.to_inputs(question, images=images, answers=options.answer))
    if options.answer is None:
        inputs = model.generate(inputs, max_new_tokens=options.max_new_tokens, do_sample=False, return_type="inputs")
    result = saliency(model, inputs, options.method, batch_size=options.batch_size)
    said = "".join(result.tokens)
    with Outputs(options, NAME, question=question, images=list(map(str, images)), answer=said, method=options.method) as out:
        out.table("explain.csv", result.to_dataframe())
        result.plot(out.path("explain.png"), pictures)
        result.page(pictures, out.path("explain.html"))
        out.say(f"question: {question}\nanswer:   {said}\n")
        out.say(f"{'log p':>8}  {'token':<14} largest effects of image tokens, by {result.method}")
        for token, log_prob, values in zip(result.tokens, result.log_probs.tolist(), result.values):
            out.say(f"{log_prob:8.3f}  {token!r:<14} {_largest(result, values)}")


def _largest(result, values, n: int = 3) -> str:
    """The image tokens with the largest values, as image, row and column."""
    places = [(i, r, c) for i, (rows, cols) in enumerate(result.grids) for r in range(rows) for c in range(cols)]
    order = values.abs().argsort(descending=True)[:n].tolist()
    several = len(result.grids) > 1
    return "; ".join(
        f"{f'image {places[k][0]} ' if several else ''}row {places[k][1]}, col {places[k][2]}: {float(values[k]):+.3f}" for k in order
    )
