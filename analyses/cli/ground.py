"""Where the answer is in the image: the contextual lens's heat map and best box."""

from __future__ import annotations

import argparse
import json

from analyses.cli.outputs import Outputs
from analyses.cli.shared import SAMPLES, add_model, add_out, at_least_one, load_model

UNKNOWN = "How far to trust this is not known for this model: docs/grounding.md says what was measured, and on what."
NAME = "ground"
HELP = "where the answer is in the image"
EXAMPLES = (
    "",
    '--image photo.jpg --question "Where is the dog?" --answer "on the sofa"',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--image", action="append", default=[], help="an image file; may be repeated")
    parser.add_argument("--question", help="default: a shipped image and its question")
    parser.add_argument("--answer", help="teacher-forced; default: the model's own answer")
    parser.add_argument("--image-layer", type=int, metavar="L", help="layer of the image tokens (default round(0.5 L))")
    parser.add_argument("--text-layer", type=int, metavar="L", help="layer of the answer (default round(0.75 L))")
    parser.add_argument("--max-new-tokens", type=int, default=20, metavar="N", help="limit for the model's own answer (default 20)")
    add_out(parser)


def run(options: argparse.Namespace) -> None:
    images, question, truth = options.image, options.question, []
    if question is None:
        if images:
            raise ValueError("an image came without a question: add --question, such as 'What is in the image?'.")
        sample = json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))[0]
        images, question, truth = [SAMPLES / sample["image"]], sample["question"], sample["depends_on"]
    elif not images:
        raise ValueError("a question came without an image: add --image FILE, there is nothing to ground in.")
    at_least_one(options, "max_new_tokens")
    from analyses.contextual_lens import contextual_score, default_layers, ground
    from analyses.experiments.grounding import caveat
    from hooked_qwen2vl.processor import open_image

    pictures = [open_image(image) for image in images]
    model = load_model(options)
    default_layers(model, options.image_layer, options.text_layer)
    inputs = model.encode(model.to_inputs(question, images=images, answers=options.answer))
    if options.answer is None:
        inputs = model.generate(inputs, max_new_tokens=options.max_new_tokens, do_sample=False, return_type="inputs")
    layers = options.image_layer, options.text_layer
    result, score = ground(model, inputs, 0, *layers), contextual_score(model, inputs, 0, *layers).score
    measured = caveat(model) if model.cfg.model_name == "scenes" else ""  # a hash of all weights takes long on a large model
    with Outputs(options, NAME, question=question, images=list(map(str, images)), answer=result.text) as out:
        out.table("grounding.csv", result.to_dataframe())
        result.plot(out.path("grounding.png"), pictures, truth, measured)
        out.say(f"question: {question}\nanswer:   {result.text}\n")
        out.say(f"score:    {score:.3f}, the cosine with the closest image token (low: hallucinated)")
        for image, (box, cosine) in enumerate(zip(result.boxes.tolist(), result.box_scores.tolist())):
            corners = ", ".join(f"{x:.0f}" for x in box)
            places = zip(("at these layers", "maximum over layers"), (result.similarity[image], result.heat[image]))
            hottest = "; ".join(f"{name}: token {tuple(divmod(int(m.argmax()), m.shape[1]))}, {float(m.max()):.3f}" for name, m in places)
            out.say(f"image {image}:  best box ({corners}) in original pixels, cosine {cosine:.3f}\n          hottest {hottest}")
        out.say(f"\n{measured or UNKNOWN}")
