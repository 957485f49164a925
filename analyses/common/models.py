"""Identification of a model: its name, dtype and a hash of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from hooked_qwen2vl.protocols import Model
from hooked_qwen2vl.quantised import Quantised


def describe_model(model: Model) -> dict[str, Any]:
    """The model's name, dtype and a hash over all its weights; models of one name with different weights differ in the hash."""
    hashed = hashlib.blake2b(digest_size=16)
    for name, weight in _numbers(model):
        hashed.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        hashed.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return {
        "name": str(getattr(model.cfg, "model_name", type(model).__name__)),
        "dtype": str(model.cfg.dtype).removeprefix("torch."),
        "weights": hashed.hexdigest(),
    }


def _numbers(model: Model) -> Iterator[tuple[str, Any]]:
    """(name, weight) for every weight; weights that accelerate offloaded are read from CPU memory or disk."""
    away: dict[str, Any] = {}
    for prefix, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "offload", False):
                for name, _ in module.named_parameters(recurse=one.place_submodules):
                    away[f"{prefix}.{name}" if prefix else name] = (one.weights_map, name)
    for name, weight in model.named_parameters(remove_duplicate=False):
        if weight.is_meta:
            held, inner = away[name]
            weight = held[inner]
        yield name, weight
    for prefix, module in model.named_modules():
        if isinstance(module, Quantised):  # the scales belong to the weight, too
            yield from ((f"{prefix}.{name}", held) for name, held in module.layer.state_dict().items() if isinstance(held, torch.Tensor))
