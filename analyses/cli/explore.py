"""A page to explore a prompt with: the image, what every token of it reads as, attention, grounding, patching."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from analyses.cli.shared import add_model, at_least_one, in_range, load_model, page_file
from hooked_qwen2vl.protocols import Model

NAME = "explore"
HELP = "one page to explore an image and a question with, without network"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--image", action="append", default=[], help="an image file; may be repeated")
    parser.add_argument("--question", help="default: a picture of the embedded world, its question and counterfactual")
    parser.add_argument("--answer", help="teacher-forced; without it, the tokens that the model itself answers")
    parser.add_argument(
        "--counterfactual",
        metavar="IMAGE",
        help="another image of the same grid, answered differently: adds patching recovery (a run for each layer and position)",
    )
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="tokens to keep by layer and position (default 5)")
    parser.add_argument("--out", type=page_file, default=Path("out/explorer.html"), help="the page (default: out/explorer.html)")


def run(options: argparse.Namespace) -> None:
    at_least_one(options, "top_k")
    images, question, other = _what(options)
    from analyses.explorer import explore

    model = load_model(options)
    in_range(options, "top_k", lambda k: k <= model.cfg.d_vocab, f"at most the {model.cfg.d_vocab} tokens of the vocabulary")
    prompt = model.encode(model.to_inputs(question, images=images))
    if options.answer is None:
        inputs = model.generate(prompt, max_new_tokens=8, do_sample=False, return_type="inputs")
    else:
        inputs = model.encode(model.to_inputs(question, images=images, answers=options.answer))
    recovered = None if other is None else _recovery(model, prompt, inputs, question, [other, *images[1:]])
    result = explore(model, inputs, images, options.top_k, recovered=recovered, question=question)
    result.page(options.out)
    print(f"question: {question}\nanswer:   {result.answer_text}\n\nwrote {options.out}")


def _what(options: argparse.Namespace) -> tuple[list[Any], str, Any]:
    """(images, question, the counterfactual of the first image or None)."""
    from hooked_qwen2vl.processor import open_image

    if options.question is None:
        if options.image:
            raise ValueError("an image came without a question: add --question, such as 'What is in the image?'.")
        from hooked_qwen2vl.scenes import counterfactual_pairs

        item, partner = counterfactual_pairs(1, seed=29, domain="shapes", category="attribute", grid=(6, 6))[0]
        return [item.image], item.question, partner.image
    if not options.image:
        raise ValueError("a question came without an image: add --image.")
    other = None if options.counterfactual is None else open_image(options.counterfactual)
    return [open_image(image) for image in options.image], options.question, other


def _recovery(model: Model, prompt: Any, inputs: Any, question: str, others: list[Any]) -> Any:
    """Residual stream patched from the image shown into the other, at every layer and position from the image on."""
    import torch

    from analyses.explorer import recovery_by_position
    from analyses.patching import patch_sweep

    corrupted = model.encode(model.to_inputs(question, images=others))
    with torch.no_grad():
        clean_logits, corrupted_logits = (model(x, logits_at=-1)[:, -1] for x in (prompt, corrupted))
    right, wrong = int(inputs.tokens[0, prompt.shape[1]]), int(corrupted_logits.argmax())
    if right == wrong:
        print(f"the other image is answered {model.to_string([wrong])!r} too: there is nothing to recover, no patching.")
        return None

    def metric(logits: Any) -> Any:
        return logits[:, -1, right] - logits[:, -1, wrong]

    first = int(prompt.positions("image[0]")[0])  # before it nothing differs
    sweep = patch_sweep(model, prompt, corrupted, metric, positions=range(first, prompt.shape[1]))
    return recovery_by_position(sweep, metric(clean_logits[:, None]).float().cpu(), (model.cfg.n_layers, inputs.shape[1]))
