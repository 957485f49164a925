"""A report whether this model equals transformers' on a checkpoint and machine: `hooked-qwen2vl check --report FILE`.

1. The machine, the versions, and the sha256 of each file of the checkpoint.
2. In float32 and in bfloat16: the self-check (`selfcheck`) with a synthetic image and with a photograph.
3. Greedy tokens of both models, and tokens per second.

An error in one precision, such as a lack of memory, is recorded, and the other precisions still run.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .selfcheck import QUESTION, reference_tokens, self_check, synthetic_image
from .version import __version__

FORMAT = "hooked_qwen2vl report 1"
DTYPES = ("float32", "bfloat16")
PHOTOGRAPH = "Describe the picture in one sentence."
NEW_TOKENS = 32
_PACKAGES = ("torch", "transformers", "transformer_lens", "tokenizers", "accelerate", "Pillow", "numpy", "torchvision", "bitsandbytes")

Models = Callable[[str], tuple[Any, Any]]


def photograph() -> Image.Image:
    """scikit-learn's sample photograph of a palace, 448 × 299 pixels."""
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg")).resize((448, 299))


def report(name: str, folder: Path, models: Models, dtypes: tuple[str, ...] = DTYPES) -> dict[str, Any]:
    """The report, as JSON values.

    Args:
        name: of the checkpoint. folder: with its files.
        models: dtype -> (a HookedQwen2VL with its processor, transformers' model of the same weights).
    """
    runs = [_run(models, dtype) for dtype in dtypes]
    return {
        "format": FORMAT,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": {"name": name, "sha256": {str(file.relative_to(folder)): _hash(file) for file in _files(folder)}},
        "versions": {"hooked_qwen2vl": __version__, "python": platform.python_version(), **_versions()},
        "machine": {"system": platform.platform(), "processor": platform.machine(), "threads": torch.get_num_threads(), "cards": _cards()},
        "runs": runs,
        "ok": all(run["ok"] for run in runs),
    }


def _run(models: Models, dtype: str) -> dict[str, Any]:
    """The report for one precision; frees its models at the end."""
    try:
        model, reference = models(dtype)
        prompts = {"drawing": (synthetic_image(), QUESTION), "photograph": (photograph(), PHOTOGRAPH)}
        prompts = {what: _prompt(model, reference, *prompt) for what, prompt in prompts.items()}
        return {"dtype": dtype, "device": str(model.cfg.device), "prompts": prompts, "ok": all(p["ok"] for p in prompts.values())}
    except (RuntimeError, MemoryError) as error:  # torch raises RuntimeError if memory is lacking
        return {"dtype": dtype, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}", "ok": False}
    finally:
        model = reference = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _prompt(model: Any, reference: Any, image: Image.Image, question: str) -> dict[str, Any]:
    table = self_check(model, reference, image, question)
    inputs = model.to_inputs(question, images=[image])
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    ours, our_speed = _timed(lambda: model.generate(inputs, **settings))
    theirs, their_speed = _timed(lambda: reference_tokens(reference, inputs, NEW_TOKENS))
    return {
        "question": question,
        "prompt_tokens": inputs.shape[1],
        "image_tokens": len(inputs.positions("image")),
        "stages": table.to_dict("records"),
        "greedy_tokens": {"ours": ours, "reference": theirs, "text": model.tokenizer.decode(ours)},
        "tokens_per_second": {"ours": our_speed, "reference": their_speed},
        "ok": bool(table["ok"].all()),
    }


def _timed(generate: Callable[[], torch.Tensor]) -> tuple[list[int], float]:
    """(the new tokens, tokens per second including the prompt); the second of two runs is timed."""
    for _ in range(2):
        begun = time.perf_counter()
        tokens = generate()[0, -NEW_TOKENS:].tolist()  # waits until a GPU has finished
        seconds = time.perf_counter() - begun
    return tokens, NEW_TOKENS / seconds


def _files(folder: Path) -> list[Path]:
    return sorted(
        file for file in folder.rglob("*") if file.is_file() and not any(p.startswith(".") for p in file.relative_to(folder).parts)
    )


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {**found, "cuda": torch.version.cuda}


def _cards() -> list[str]:
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return ["mps"] if torch.backends.mps.is_available() else []
