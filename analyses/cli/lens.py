"""What the model would answer if it stopped after each layer."""

from __future__ import annotations

import argparse
import json

from analyses.cli.shared import SAMPLES, add_model, add_out, at_least_one, load_model, out_folder

NAME = "lens"
HELP = "layer by layer, what the model would answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--image", action="append", default=[], help="an image file; may be repeated")
    parser.add_argument("--question", help="default: a shipped image and its question")
    parser.add_argument("--answer", help="teacher-forced; without it, the tokens that the model itself answers")
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

    model = load_model(options)
    inputs = model.encode(model.to_inputs(question, images=images, answers=options.answer))
    if options.answer is None:
        inputs = model.generate(inputs, max_new_tokens=8, do_sample=False, return_type="inputs")
    answer = inputs.positions("answer")
    lens = logit_lens(model, inputs, (answer - 1).tolist(), top_k=options.top_k)  # where each token is predicted
    out = out_folder(options)
    written = [out / name for name in ("lens.csv", "lens.png", "lens.html")]
    lens.to_dataframe().to_csv(written[0], index=False)
    lens.plot(written[1])
    lens.page(written[2])
    if images:
        pictures = [open_image(image) for image in images]
        written.append(out / "explorer.html")
        explore(model, inputs, pictures, options.top_k, question=question).page(written[-1])
    for number, image in enumerate(images):
        suffix = f"_{number}" if len(images) > 1 else ""
        written.append(out / f"lens_image{suffix}.png")
        part = logit_lens(model, inputs, f"image[{number}]", top_k=options.top_k)
        part.plot_image(open_image(image), written[-1])
        if len(part.positions) > MOST_LABELS:
            written.append(out / f"lens_image{suffix}.pdf")
            part.plot_image(open_image(image), written[-1], every_token=True)
        written.append(out / f"lens_image{suffix}.csv")
        part.to_dataframe().to_csv(written[-1], index=False)
    print(f"question: {question}\nanswer:   {model.to_string(inputs.tokens[0, answer])}\n")
    print(_table(lens))
    if lens.n_differs:
        print(f"\nat {lens.n_differs} of {len(lens.positions)} positions the model's own logits put another token first than the lens in float32")
    print("\n" + "\n".join(f"wrote {path}" for path in written))


def _table(lens) -> str:
    """The layers of the first answer token: entropy, and the top tokens with their probabilities."""
    lines = [f"{'entry':>11}  {'entropy':>8}  top tokens at the first token of the answer"]
    for layer, label in enumerate(lens.layer_labels):
        tops = zip(lens.top_tokens[layer][0], lens.top_probs[layer, 0].tolist())
        words = "  ".join(f"{token!r:<12} {probability:5.3f}" for token, probability in tops)
        lines.append(f"{label:>11}  {float(lens.entropy[layer, 0]):5.2f} nat  {words}")
    return "\n".join(lines)
