"""The command `hooked-qwen2vl`. Heavy imports wait until a command runs, so that --help is quick."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

SAMPLES = Path(__file__).parent / "scenes" / "samples"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0; 1 when a check failed; 2 with a paragraph on what was wrong
    with the input."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, OSError) as error:
        print(f"hooked-qwen2vl: {error}", file=sys.stderr)
        return 2



def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hooked-qwen2vl", description="Qwen2-VL, opened as TransformerLens opens GPT-2.")
    commands = parser.add_subparsers(required=True, metavar="command")
    lens = commands.add_parser("lens", help="layer by layer, what the model would answer")
    lens.add_argument("--model", default="scenes", help="a Qwen2-VL folder or hub id (default: the embedded model)")
    lens.add_argument("--dtype", help="float32, bfloat16, …; default: the checkpoint's own")
    lens.add_argument("--device", help="cpu, cuda, …")
    lens.add_argument("--image", action="append", default=[], help="an image file; may be repeated")
    lens.add_argument("--question", help="default: a shipped image and its question")
    lens.add_argument("--answer", help="teacher-forced; without it, the tokens that the model itself answers")
    lens.add_argument("--top-k", type=int, default=5, metavar="K", help="tokens to show for each layer (default 5)")
    lens.add_argument("--out", type=Path, default=Path("out"), help="folder for what is written (default: out)")
    lens.set_defaults(run=_lens)
    check = commands.add_parser("check", help="compare with transformers' own model, stage by stage")
    check.add_argument("--model", default="scenes", help="a Qwen2-VL folder or hub id (default: the embedded model)")
    check.add_argument("--dtype", default="float32", help="to compare in (default float32)")
    check.add_argument("--device", help="cpu, cuda, …")
    check.set_defaults(run=_check)
    scenes = commands.add_parser("scenes", help="a contact sheet of the embedded world")
    scenes.add_argument("--n", type=int, default=9, help="how many pictures (default 9)")
    scenes.add_argument("--seed", type=int, default=0)
    scenes.add_argument("--out", type=Path, default=Path("out"), help="folder for what is written (default: out)")
    scenes.set_defaults(run=_scenes)
    return parser


def _lens(options: argparse.Namespace) -> None:
    images, question = options.image, options.question
    if question is None:
        if images:
            raise ValueError("an image came without a question: add --question, such as 'What is in the image?'.")
        sample = json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))[0]
        images, question = [SAMPLES / sample["image"]], sample["question"]
    if options.top_k < 1:
        raise ValueError(f"--top-k must be at least 1, got {options.top_k}.")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out} is a file: expected a folder.")
    from analyses.logit_lens import logit_lens

    from .model import HookedQwen2VL
    from .processor import open_image

    model = HookedQwen2VL.from_pretrained(options.model, dtype=options.dtype, device=options.device)
    inputs = model.encode(model.to_inputs(question, images=images, answers=options.answer))
    if options.answer is None:
        inputs = model.generate(inputs, max_new_tokens=8, do_sample=False, return_type="inputs")
    answer = inputs.positions("answer")
    lens = logit_lens(model, inputs, (answer - 1).tolist(), top_k=options.top_k)  # where each token is predicted
    options.out.mkdir(parents=True, exist_ok=True)
    written = [options.out / name for name in ("lens.csv", "lens.png", "lens.html")]
    lens.to_dataframe().to_csv(written[0], index=False)
    lens.plot(written[1])
    lens.page(written[2])
    for number, image in enumerate(images):
        suffix = f"_{number}" if len(images) > 1 else ""
        written.append(options.out / f"lens_image{suffix}.png")
        part = logit_lens(model, inputs, f"image[{number}]", top_k=options.top_k)
        part.plot_image(open_image(image), written[-1])
        written.append(options.out / f"lens_image{suffix}.csv")
        part.to_dataframe().to_csv(written[-1], index=False)
    print(f"question: {question}\nanswer:   {model.to_string(inputs.tokens[0, answer])}\n")
    print(_table(lens))
    print("\n" + "\n".join(f"wrote {path}" for path in written))


def _check(options: argparse.Namespace) -> int:
    from transformers import Qwen2VLForConditionalGeneration

    from .checkpoint import open_checkpoint
    from .model import HookedQwen2VL
    from .selfcheck import self_check

    model = HookedQwen2VL.from_pretrained(options.model, dtype=options.dtype, device=options.device)
    folder = open_checkpoint(options.model).folder
    reference = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=model.cfg.dtype).eval().to(model.cfg.device)
    table = self_check(model, reference)
    print(table.to_string(index=False, float_format=lambda x: f"{x:.1e}"))
    failed = table[~table["ok"]]
    if len(failed):
        first = failed.iloc[0]
        print(f"\nfirst stage that differs: {first['stage']}, by {first['error']:.1e} (tolerance {first['tolerance']:.0e})")
        return 1
    print("\nevery stage agrees with the reference")
    return 0


def _table(lens) -> str:
    """The layers of the first answer token: entropy, and the top tokens with their probabilities."""
    lines = [f"{'entry':>11}  {'entropy':>8}  top tokens at the first token of the answer"]
    for layer, label in enumerate(lens.layer_labels):
        tops = zip(lens.top_tokens[layer][0], lens.top_probs[layer, 0].tolist())
        words = "  ".join(f"{token!r:<12} {probability:5.3f}" for token, probability in tops)
        lines.append(f"{label:>11}  {float(lens.entropy[layer, 0]):5.2f} nat  {words}")
    return "\n".join(lines)


def _scenes(options: argparse.Namespace) -> None:
    from .scenes import contact_sheet, sample

    if options.n < 1:
        raise ValueError(f"--n must be at least 1, got {options.n}.")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "scenes.png"
    contact_sheet(sample(options.n, seed=options.seed), path)
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
