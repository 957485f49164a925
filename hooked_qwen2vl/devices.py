"""A model spread over GPUs, CPU and disk by accelerate.

- A block is never split, and is loaded completely before it runs, because its code reads the weights of its submodules.
- An offloaded weight is a placeholder on the meta device. A matmul with one gives garbage without an error (torch 2.13), so code
  that would read one raises an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry

from .moved import moved_names

__getattr__ = moved_names(__name__)

WHOLE = ["Block", "VisionProjector"]
_INSIDE = re.compile(r"((vision_encoder\.)?blocks\.\d+|vision_projector)\..+")
AWAY = ("cpu", "disk")


def dispatch(model: Any, device_map: str | dict, max_memory: dict | None = None, offload_folder: str | Path | None = None) -> Any:
    """Spreads a model over devices without splitting blocks.

    Raises:
        ValueError: an unknown policy, a map that splits a block or lacks a module, modules on disk without a folder, or a folder
            that is not empty (accelerate would read the weights in it).
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    if isinstance(device_map, str):
        if device_map not in ("auto", "balanced", "sequential"):
            raise ValueError(f"device_map must be 'auto', 'balanced', 'sequential' or a map, got {device_map!r}.")
        if device_map != "sequential":
            max_memory = get_balanced_memory(model, max_memory, no_split_module_classes=WHOLE)
        device_map = dict(infer_auto_device_map(model, max_memory, no_split_module_classes=WHOLE))
    elif max_memory is not None:
        raise ValueError("max_memory= is for 'auto', 'balanced' and 'sequential'; a map says itself what goes where.")
    for name in device_map:
        if found := _INSIDE.fullmatch(name):
            raise ValueError(f"device_map names {name!r}, a part of {found[1]!r}, which must stay whole: place that.")
    main = next((device for device in device_map.values() if device not in AWAY), "cpu")
    model = dispatch_model(
        model, device_map, main_device=main, offload_dir=_empty_folder(device_map, offload_folder),
        preload_module_classes=WHOLE, force_hooks=True,
    )  # fmt: skip
    model.cfg.device = str(torch.device(main))
    return model


def _empty_folder(device_map: dict, folder: str | Path | None) -> str | None:
    on_disk = [name for name, device in device_map.items() if device == "disk"]
    if not on_disk:
        return None
    if folder is None:
        raise ValueError(f"device_map puts {', '.join(on_disk)} on disk: pass offload_folder=, an empty or new folder.")
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: weights in it would be taken for this model's. Choose a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def n_devices(model: nn.Module) -> int:
    """Number of devices that the model runs on; CPU and disk do not count if they only store weights for a GPU."""
    devices = set(getattr(model, "hf_device_map", {}).values())
    return len(devices.difference(AWAY)) or 1


def to_its_device(entry: TransformerLensKeyValueCacheEntry, block: nn.Module) -> TransformerLensKeyValueCacheEntry:
    """The block's keys and values on the device that the block runs on; they are moved once, while they are empty."""
    device = getattr(getattr(block, "_hf_hook", None), "execution_device", None)
    if device is not None and entry.past_keys.device != torch.device(device):
        entry.past_keys, entry.past_values = entry.past_keys.to(device), entry.past_values.to(device)
    return entry


def check_storage_can_be_shared(hf_model: nn.Module, name: str) -> None:
    """Checks that a transformers model is not spread over devices, so that its storage can be shared.

    Raises:
        ValueError: it is spread over devices.
    """
    devices = {str(weight.device) for weight in hf_model.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise ValueError(
            f"{name} is spread over {', '.join(sorted(devices))}: its placeholders would be taken for weights. Use "
            f"HookedQwen2VL.from_pretrained(folder, device_map='auto')."
        )


class WeightsAt:
    """A view of a module from another device: reading a weight, or calling the module, gives tensors on that device.

    For code that combines weights with activations on another device, such as a cache on the CPU. Every access copies the weight.

    Raises:
        RuntimeError: when an offloaded weight is read.
    """

    def __init__(self, module: Any, device: torch.device):
        self._module, self._device = module, device

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, torch.Tensor) and value.is_meta:
            raise RuntimeError(
                f"{name} is offloaded: expected its numbers in memory, found a placeholder on the meta device. Load the model "
                f"without device_map, or with more memory, to read its weights."
            )
        return self._seen(value)

    def __getitem__(self, index: int) -> Any:
        return self._seen(self._module[index])

    def __len__(self) -> int:
        return len(self._module)

    def __call__(self, *args: Any) -> Any:
        own = next(self._module.parameters()).device
        there = own if own.type != "meta" else self._device  # accelerate's hook loads offloaded weights
        return self._seen(self._module(*(arg.to(there) for arg in args)))

    def _seen(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(self._device)
        if isinstance(value, nn.Module):
            return WeightsAt(value, self._device)
        if callable(value):
            return lambda *args, **kwargs: self._seen(value(*args, **kwargs))
        return value
