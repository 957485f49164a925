"""The command `hooked-qwen2vl`. Heavy imports wait until a command runs, so that --help is quick."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or 2 with one paragraph on what was wrong with the input."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except ValueError as error:
        print(f"hooked-qwen2vl: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hooked-qwen2vl", description="Qwen2-VL, opened as TransformerLens opens GPT-2.")
    commands = parser.add_subparsers(required=True, metavar="command")
    lens = commands.add_parser("lens", help="layer by layer, what the model would answer")
    lens.add_argument("--model", required=True, help="a Qwen2-VL folder, or a hub id")
    lens.add_argument("--image", action="append", default=[], help="an image file; may be repeated")
    lens.add_argument("--question", required=True)
    lens.add_argument("--answer", help="teacher-forced answer; without it the model's own greedy answer is read")
    lens.add_argument("--top-k", type=int, default=5)
    lens.add_argument("--out", type=Path, default=Path("out"), help="folder for the table and the picture")
    lens.set_defaults(run=_lens)
    return parser


def _lens(options: argparse.Namespace) -> None:
    from analyses.logit_lens import logit_lens

    from .model import HookedQwen2VL

    model = HookedQwen2VL.from_pretrained(options.model)
    inputs = model.to_inputs(options.question, images=options.image, answers=options.answer)
    if options.answer is None:
        inputs = model.generate(inputs, max_new_tokens=8, do_sample=False, return_type="inputs")
    answer = inputs.positions("answer").tolist()
    predicting = [position - 1 for position in answer]  # where each answer token is predicted
    lens = logit_lens(model, inputs, predicting, top_k=options.top_k)
    options.out.mkdir(parents=True, exist_ok=True)
    table, picture = options.out / "lens.csv", options.out / "lens.png"
    lens.to_dataframe().to_csv(table, index=False)
    lens.plot(picture)
    print(f"answer: {model.to_string(inputs.tokens[0, answer])!r}; layer by layer at its first token:")
    for layer, label in enumerate(lens.layer_labels):
        tops = zip(lens.top_tokens[layer][0], lens.top_probs[layer, 0].tolist())
        words = "  ".join(f"{token!r} {probability:.3f}" for token, probability in tops)
        print(f"{label:>11}  {float(lens.entropy[layer, 0]):5.2f} nats  {words}")
    print(f"wrote {table}\nwrote {picture}")


if __name__ == "__main__":
    sys.exit(main())
