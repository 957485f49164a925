"""Attention knockout: which flows of information the answers need, and in which layers."""

from __future__ import annotations

import argparse
from typing import Any

from analyses.cli.outputs import Outputs
from analyses.cli.shared import add_model, add_out, at_least_one, load_model, single_token

NAME = "knockout"
HELP = "block attention between parts of the prompt, layer by layer"
EXAMPLES = (
    "--limit 30",
    '--image photo.jpg --question "What color is the car?"',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--image", action="append", default=[], help="one prompt: an image file; may be repeated")
    parser.add_argument("--question", help="one prompt: the question")
    parser.add_argument("--answer", help="one prompt: the token whose probability is measured (default: the model's first token)")
    parser.add_argument("--limit", type=int, default=100, help="without --question: questions of the embedded world (default 100)")
    parser.add_argument("--window", type=int, help="layers blocked at once (default: a quarter of the layers)")
    add_out(parser)


def run(options: argparse.Namespace) -> None:
    at_least_one(options, "limit", "window")
    if (options.question is None) != (not options.image) or (options.answer is not None and options.question is None):
        raise ValueError("one prompt needs --image and --question; without them the embedded world's questions are asked (--limit).")
    from analyses.data.examples import examples
    from analyses.experiments.knockout import knockout_study

    about: dict[str, Any] = {}
    if options.question is None:
        result = knockout_study(load_model(options), examples("scenes", options.limit), options.window)
    else:
        result, answer = _one(options)
        about = {"question": options.question, "images": list(map(str, options.image)), "answer": answer}
    with Outputs(options, NAME, **about) as out:
        out.table("knockout.csv", result.to_dataframe())
        result.plot(out.path("knockout.png"))
        if about:
            before = f"answer: {about['answer']!r}, probability {float(result.baseline[0]):.3f} with nothing blocked"
            out.say(f"question: {about['question']}\n{before}; window of {result.window} layers")
        else:
            out.say(f"{result.effects.shape[-1]} items answered rightly, {result.skipped} not; window of {result.window} layers")
        for reason, n in result.left_out.items():
            out.say(f"left out: {n}, {reason}")
        out.say("change of the answer's probability where a flow is blocked, by the layer in the window's middle")
        table = result.to_dataframe().pivot(index="layer", columns="flow", values="effect_percent")[list(result.flows)]
        out.say(table.to_string(float_format=lambda x: f"{x:+.1f} %"))


def _one(options: argparse.Namespace) -> tuple[Any, str]:
    """(effects on one prompt, the text of the token whose probability they change)."""
    from analyses.knockout import attention_knockout
    from hooked_qwen2vl.processor import open_image

    images = [open_image(image) for image in options.image]
    model = load_model(options)
    inputs = model.encode(model.to_inputs(options.question, images=images))
    token = int(model(inputs, logits_at=-1)[0, -1].argmax()) if options.answer is None else single_token(model, "--answer", options.answer)
    return attention_knockout(model, inputs, [token], window=options.window, only_correct=False), str(model.to_string([token]))
