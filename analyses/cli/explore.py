"""An HTML page to explore a prompt: the image, the logit lens at every token, attention, grounding, patching."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from analyses.cli.outputs import Outputs
from analyses.cli.shared import add_model, add_out, at_least_one, in_range, load_model, say_grids
from hooked_qwen2vl.files import open_regular
from hooked_qwen2vl.protocols import Model

NAME = "explore"
HELP = "one page to explore an image and a question; needs no network"
EXAMPLES = (
    "--open",
    '--image photo.jpg --question "What color is the car?" --follow " red"',
    '--image shown.jpg --counterfactual other.jpg --question "What color is the car?"',
    '--video frames/ --question "What happens?"',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--image", action="append", default=[], help="an image file; may be repeated")
    parser.add_argument(
        "--video", action="append", default=[], help="a folder of frames (in the order of their names), or a GIF; may be repeated"
    )
    parser.add_argument("--question", help="default: a picture of the embedded world, its question and counterfactual")
    parser.add_argument("--answer", help="teacher-forced; default: the model's own answer")
    parser.add_argument(
        "--counterfactual",
        metavar="IMAGE",
        help="another image of the same grid, with another answer: adds patching recovery (one run per layer and position)",
    )
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="tokens to keep by layer and position (default 5)")
    parser.add_argument(
        "--follow", action="append", default=[], metavar="TOKEN", help="a token to show at every layer and position; may be repeated"
    )
    add_out(parser)


def run(options: argparse.Namespace) -> None:
    at_least_one(options, "top_k")
    images, videos, question, other = _what(options)
    from analyses.explorer import explore

    model = load_model(options)
    in_range(options, "top_k", lambda k: k <= model.cfg.d_vocab, f"at most the {model.cfg.d_vocab} tokens of the vocabulary")
    prompt = model.encode(model.to_inputs(question, images=images, videos=videos))
    if options.answer is None:
        inputs = model.generate(prompt, max_new_tokens=8, do_sample=False, return_type="inputs")
    else:
        inputs = model.encode(model.to_inputs(question, images=images, videos=videos, answers=options.answer))
    more: dict[str, Any] = {}
    if other is not None:
        more = _recovery(model, prompt, inputs, question, images, [other, *images[1:]]) | {"other": other}
    result = explore(model, inputs, images, options.top_k, options.follow, question=question, videos=videos, **more)
    about = {"question": question, "images": list(map(str, options.image)), "answer": result.answer_text}
    with Outputs(options, NAME, **about) as out:
        result.page(out.path("explorer.html"))
        out.say(f"question: {question}\nanswer:   {result.answer_text}")


def _what(options: argparse.Namespace) -> tuple[list[Any], list[Any], str, Any]:
    """(images, videos, question, the counterfactual of the first image or None)."""
    from hooked_qwen2vl.processor import open_image

    if options.question is None:
        if options.image or options.video:
            raise ValueError("an image came without a question: add --question, such as 'What is in the image?'.")
        from hooked_qwen2vl.scenes import counterfactual_pairs

        item, partner = counterfactual_pairs(1, seed=29, domain="shapes", category="attribute", grid=(6, 6))[0]
        return [item.image], [], item.question, partner.image
    if not options.image and not options.video:
        raise ValueError("a question came without an image: add --image or --video.")
    if options.counterfactual is not None and not options.image:
        raise ValueError("--counterfactual is another first image: there is no --image.")
    other = None if options.counterfactual is None else open_image(options.counterfactual)
    return [open_image(image) for image in options.image], list(map(_frames, options.video)), options.question, other


def _frames(video: str) -> list[Any]:
    """The frames in a folder or in a GIF.

    Raises:
        ValueError: neither of the two, or no frames.
    """
    from PIL import Image, ImageSequence, UnidentifiedImageError

    from hooked_qwen2vl.processor import open_image

    path = Path(video)
    if path.is_dir():
        frames = [open_image(file) for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")]
    else:
        try:
            with open_regular(path) as file, Image.open(file) as moving:
                frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(moving)]
        except (UnidentifiedImageError, FileNotFoundError) as error:
            raise ValueError(
                f"--video {path} is neither a folder of frames nor a GIF: take the frames out first, `ffmpeg -i FILE -vf fps=2 frames/%04d.png`."
            ) from error
    if not frames:
        raise ValueError(f"--video {path} has no frames.")
    return frames


def _recovery(model: Model, prompt: Any, inputs: Any, question: str, images: list[Any], others: list[Any]) -> dict[str, Any]:
    """Recovery when the residual stream is patched from `images` into `others`, at every layer and position from the image on."""
    import torch

    from analyses.explorer import recovery_by_position
    from analyses.patching import patch_sweep

    corrupted = model.to_inputs(question, images=others)
    if corrupted.grids.tolist() != prompt.grids.tolist():
        raise ValueError(
            "--counterfactual cannot stand in for the first image: "
            + say_grids(model, {"--image": images[0], "--counterfactual": others[0]})
        )
    corrupted = model.encode(corrupted)
    with torch.no_grad():
        clean_logits, corrupted_logits = (model(x, logits_at=-1)[:, -1] for x in (prompt, corrupted))
    right, wrong = int(inputs.tokens[0, prompt.shape[1]]), int(corrupted_logits.argmax())
    if right == wrong:
        print(f"the other image is answered {model.to_string([wrong])!r} too: there is nothing to recover, no patching.")
        return {}

    def metric(logits: Any) -> Any:
        return logits[:, -1, right] - logits[:, -1, wrong]

    first = int(prompt.positions("image[0]")[0])  # the prompts are equal before it
    sweep = patch_sweep(model, prompt, corrupted, metric, positions=range(first, prompt.shape[1]))
    recovered = recovery_by_position(sweep, metric(clean_logits[:, None]).float().cpu(), (model.cfg.n_layers, inputs.shape[1]))
    return {"recovered": recovered, "other_answer": model.to_string([wrong])}
