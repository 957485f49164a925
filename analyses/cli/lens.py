"""The logit lens: what the model would answer if it stopped after each layer."""

from __future__ import annotations

import argparse
import json

from analyses.cli.outputs import Outputs
from analyses.cli.shared import SAMPLES, add_model, add_out, at_least_one, in_range, load_model

NAME = "lens"
HELP = "layer by layer, what the model would answer"
EXAMPLES = (
    "",
    '--image photo.jpg --question "What is in the image?" --open',
    '--model Qwen/Qwen2-VL-2B-Instruct --image a.jpg --image b.jpg --question "What differs?" --answer "the hat"',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--image", action="append", default=[], help="an image file; may be repeated")
    parser.add_argument("--question", help="default: a shipped image and its question")
    parser.add_argument("--answer", help="teacher-forced; default: the model's own answer")
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="tokens to show for each layer (default 5)")
    add_out(parser)


def run(options: argparse.Namespace) -> None:
    images, question = options.image, options.question
    if question is None:
        if images:
            raise ValueError("an image came without a question: add --question, such as 'What is in the image?'.")
        sample = json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))[0]
        images, question = [SAMPLES / sample["image"]], sample["question"]
    at_least_one(options, "top_k")
    from analyses.explorer import explore
    from analyses.logit_lens import logit_lens
    from analyses.views.lens import MOST_LABELS
    from hooked_qwen2vl.processor import open_image

    pictures = [open_image(image) for image in images]
    model = load_model(options)
    in_range(options, "top_k", lambda k: k <= model.cfg.d_vocab, f"at most the {model.cfg.d_vocab} tokens of the vocabulary")
    inputs = model.encode(model.to_inputs(question, images=images, answers=options.answer))
    if options.answer is None:
        inputs = model.generate(inputs, max_new_tokens=8, do_sample=False, return_type="inputs")
    answer = inputs.positions("answer")
    said = model.to_string(inputs.tokens[0, answer])
    lens = logit_lens(model, inputs, (answer - 1).tolist(), top_k=options.top_k)  # where each token is predicted
    with Outputs(options, NAME, question=question, images=list(map(str, images)), answer=said) as out:
        out.table("lens.csv", lens.to_dataframe())
        lens.plot(out.path("lens.png"), question)
        lens.page(out.path("lens.html"), pictures)
        if images:
            explore(model, inputs, pictures, options.top_k, question=question).page(out.path("explorer.html"))
        for number, picture in enumerate(pictures):
            name = f"lens_image_{number}" if len(images) > 1 else "lens_image"
            part = logit_lens(model, inputs, f"image[{number}]", top_k=options.top_k)
            part.plot_image(picture, out.path(f"{name}.png"))
            if len(part.positions) > MOST_LABELS:
                part.plot_image(picture, out.path(f"{name}.pdf"), every_token=True)
            out.table(f"{name}.csv", part.to_dataframe())
        out.say(f"question: {question}\nanswer:   {said}\n")
        out.say(_table(lens))
        if lens.n_differs:
            out.say(
                f"\nat {lens.n_differs} of {len(lens.positions)} positions the model's own logits put another token first than the lens in float32"
            )


def _table(lens) -> str:
    """A table in text: at the first answer token, each layer's entropy and top tokens with their probabilities."""
    lines = [f"{'layer':>11}  {'entropy':>8}  top tokens at the first token of the answer"]
    for layer, label in enumerate(lens.layer_labels):
        tops = zip(lens.top_tokens[layer][0], lens.top_probs[layer, 0].tolist())
        words = "  ".join(f"{token!r:<12} {probability:5.3f}" for token, probability in tops)
        lines.append(f"{label:>11}  {float(lens.entropy[layer, 0]):5.2f} nat  {words}")
    return "\n".join(lines)
