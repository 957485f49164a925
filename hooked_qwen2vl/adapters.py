"""LoRA adapters, merged by peft: (base weights, adapter) -> weights of the tuned model.

The adapter is a PEFT folder (`adapter_config.json` and `adapter_model.safetensors`), or is part of a model in memory that peft
has wrapped. In both cases peft's layers merge their weights. The user's model is not changed, and weights without an adapter are
shared, not copied.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, refuse_other_adapters
from .config import HookedQwen2VLConfig
from .weights import LM_HEAD, canonical, canonical_tensors, few

_WRAPPED = "base_model.model."  # peft's prefix of the base model's names
_ADAPTED = re.compile(r"(.+?)\.(?:lora_\w+|base_layer)(?:\.|$)")


def merge_adapter(
    cfg: HookedQwen2VLConfig, config: Mapping[str, Any], base: Mapping[str, Tensor], folder: Path, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """HF name -> weights of the base with the adapter of a folder merged in.

    Args:
        config: the base's parsed `config.json`.
        base: HF name -> tensors of the base, in the layout of transformers 4 or 5.
        dtype: to which the base is cast before the merge, as a user of peft would load it; None: its own.
    Raises:
        ValueError: peft is not installed, the adapter belongs to another base, this peft does not know one of its settings, a weight
            of the file is not used, or an adapted layer has no weights in it.
    """
    peft = _peft(str(folder))
    with torch.device("meta"):
        hf_model = _reference_class(cfg)(_reference_class(cfg).config_class.from_dict(dict(config)))
    tensors = {_hf_name(name): tensor for name, tensor in canonical_tensors(cfg, base, cfg.model_name).items()}
    absent = hf_model.load_state_dict(tensors, strict=False, assign=True).missing_keys
    hf_model.tie_weights()
    if absent := [name for name in absent if name != LM_HEAD or not cfg.text.tie_word_embeddings]:
        raise ValueError(f"{cfg.model_name} lacks weights that its configuration describes: {few(absent)}.")
    if dtype is not None:
        hf_model.to(dtype)
    return merged_weights(_with_adapter(peft, hf_model, folder))


def is_adapted(hf_model: Any) -> bool:
    """Whether a model has peft's adapters, from a PeftModel or from transformers' `add_adapter`."""
    return any(type(module).__module__.split(".")[0] == "peft" for module in hf_model.modules())


def adapted_model(hf_model: Any) -> tuple[nn.Module, str | None]:
    """(the transformers model inside, the names of its active adapters; None if there are none).

    Raises:
        ValueError: an adapter that is not a LoRA.
    """
    configs = getattr(hf_model, "peft_config", {})
    for config in configs.values():
        refuse_other_adapters(getattr(config.peft_type, "value", config.peft_type), type(hf_model).__name__)
    inner = hf_model.get_base_model() if hasattr(hf_model, "get_base_model") else hf_model
    layers = [module for module in inner.modules() if hasattr(module, "active_adapters") and hasattr(module, "disable_adapters")]
    names = {name for layer in layers if not layer.disable_adapters for name in (layer.merged_adapters or layer.active_adapters)}
    return inner, ", ".join(sorted(names)) or None


def merged_weights(hf_model: Any) -> dict[str, Tensor]:
    """HF name -> the weights that the model computes with: merged copies for peft's layers, the model's own storage for others."""
    inner = hf_model.get_base_model() if hasattr(hf_model, "get_base_model") else hf_model
    return dict(_weights(inner, "", _merge))


def _weights(module: Any, prefix: str, merge: Callable[[nn.Module], nn.Module]) -> Iterator[tuple[str, Tensor]]:
    module = merge(module)
    for name, weight in module.named_parameters(recurse=False):
        yield prefix + name, weight.detach()
    for name, child in module.named_children():
        yield from _weights(child, f"{prefix}{name}.", merge)


@torch.no_grad()
def _merge(module: Any) -> nn.Module:
    """For a module of peft, the plain module with merged weights; other modules unchanged."""
    if hasattr(module, "unload_and_optionally_merge_module"):  # modules_to_save, trainable tokens
        if module.disable_adapters:
            return module.original_module
        if not hasattr(module, "token_adapter"):
            return _merge(module.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None))
        return copy.deepcopy(module).unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    if not hasattr(module, "base_layer"):
        return module
    if module.merged != module.disable_adapters:  # merged and active, or neither: the base layer is right
        return module.get_base_layer()
    module = copy.deepcopy(module)
    if module.disable_adapters:
        module.unmerge()
    else:
        module.merge(safe_merge=False)
    return module.get_base_layer()


def _with_adapter(peft: ModuleType, hf_model: Any, folder: Path) -> nn.Module:
    """The base as a PeftModel with all weights of the adapter's file loaded."""
    settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    if unknown := [f"{key} = {value!r}"[:80] for key, value in settings.items() if key not in known and value]:
        raise ValueError(f"{folder / ADAPTER_CONFIG} has settings that peft {peft.__version__} does not know: {few(unknown)}; update peft.")
    settings = {key: value for key, value in settings.items() if key in known}
    config = peft.LoraConfig(**settings | {"inference_mode": True, "base_model_name_or_path": None})
    stored = load_file(folder / ADAPTER_WEIGHTS)
    tensors = {_renamed(key): tensor for key, tensor in stored.items()}
    if set(tensors) != set(stored):
        _follow_names(peft, config, list(stored))
    try:
        with warnings.catch_warnings():  # between peft and transformers; a user can do nothing about it
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            wrapped = peft.get_peft_model(hf_model, config)
        needed, possible = (peft.get_peft_model_state_dict(wrapped, save_embedding_layers=also) for also in (False, True))
        _require_every_weight(tensors, needed, possible, folder)
        peft.set_peft_model_state_dict(wrapped, tensors)
    except (KeyError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"peft could not apply the adapter in {folder} to this base: {str(error)[:200]}.") from error
    return wrapped


def _follow_names(peft: ModuleType, config: Any, stored: list[str]) -> None:
    """Changes settings that name layers as in transformers 4: the target modules become exactly the layers in the file, under their
    names in transformers 5, and keep the rank and scale of their old names."""
    old = {found[1] for key in stored if ".lora_" in key and (found := _ADAPTED.match(key.removeprefix(_WRAPPED)))}
    new = {name: _hf_name(canonical(name + ".weight")).removesuffix(".weight") for name in old}
    config.target_modules, config.exclude_modules = set(new.values()), None
    config.layers_to_transform = config.layers_pattern = None
    from peft.utils.other import get_pattern_key

    for patterns in ("rank_pattern", "alpha_pattern"):
        given = getattr(config, patterns)
        keys = {name: get_pattern_key(list(given), name) for name in old}
        setattr(config, patterns, {re.escape(new[name]): given[key] for name, key in keys.items() if key in given})


def _require_every_weight(
    tensors: Mapping[str, Tensor], needed: Mapping[str, Tensor], possible: Mapping[str, Tensor], folder: Path
) -> None:
    """Raises ValueError unless every tensor of the file has a layer and every adapted layer its tensors; peft would only warn."""
    problems = [f"unused: {name}" for name in tensors if name not in possible]
    problems += [f"missing: {name}" for name in needed if name not in tensors]
    problems += [
        f"misshapen: {name} is {tuple(tensor.shape)}, expected {tuple(possible[name].shape)}"
        for name, tensor in tensors.items() if name in possible and tensor.shape != possible[name].shape
    ]  # fmt: skip
    problems += [f"not finite: {name}" for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if problems:
        raise ValueError(
            f"{folder / ADAPTER_WEIGHTS} is not an adapter of this base, or not a whole one: {few(problems)}. Merge it where it was "
            f"trained (merge_and_unload()) and load the merged folder."
        )


def _renamed(key: str) -> str:
    """The name of an adapter's weight in transformers 5."""
    if not key.startswith(_WRAPPED):
        return key
    return _WRAPPED + _hf_name(canonical(key.removeprefix(_WRAPPED)))


def _hf_name(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"


def _reference_class(cfg: HookedQwen2VLConfig) -> type:
    import transformers

    return getattr(transformers, cfg.original_architecture)


def _peft(where: str) -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            f"{where} is a LoRA adapter, which peft merges: pip install 'hooked-qwen2vl[adapters]', or merge it where it was trained "
            f"(merge_and_unload()) and load the merged folder."
        ) from error
    return peft
