"""Linear layers quantised by bitsandbytes: its kernels run, and reading a weight dequantises it.

The modules of the reference (`Linear4bit`, `Linear8bitLt`) replace ours. `W_Q`, `W_in`, … are computed at every access and cannot be
written in place, because the model would not use the written values.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

KINDS = ("Linear4bit", "Linear8bitLt")


class Quantised(nn.Module):
    """A quantised linear layer of the reference, or some of its rows (the tower's queries, keys and values are one layer there).

    Args:
        layer: bitsandbytes' module, shared with the reference. rows: rows of its output; all rows are computed in any case.
        dtype: of the activations, and of biases and dequantised weights.
    """

    def __init__(self, layer: Any, rows: slice, dtype: torch.dtype):
        super().__init__()
        self.layer, self.rows, self.dtype = layer, rows, dtype
        self.in_features, self.out_features = layer.in_features, len(range(*rows.indices(layer.out_features)))

    def forward(self, x: Float[Tensor, "*axes d_in"]) -> Float[Tensor, "*axes d_out"]:
        flat = self.layer(x.flatten(0, -2))  # its kernels take two or three axes
        return flat[:, self.rows].unflatten(0, x.shape[:-1])

    def dequantised(self) -> Float[Tensor, "out in"]:
        """The dequantised weight, a copy."""
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        return dequantize_bnb_weight(self.layer.weight, getattr(self.layer, "state", None)).to(self.dtype)[self.rows]

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """As `dequantised`, but an inference tensor, so that writing into it is an error (`.clone()` gives a writable copy)."""
        with torch.inference_mode():
            return self.dequantised()

    @property
    def bias(self) -> Float[Tensor, "out"]:
        """The layer's bias, or zeros that cannot be written in place."""
        if self.layer.bias is None:
            return torch.zeros(1, dtype=self.dtype, device=self.layer.weight.device).expand(self.out_features)
        with torch.inference_mode():
            return self.layer.bias.detach().to(self.dtype, copy=True)[self.rows]


def by_bitsandbytes(config: Mapping[str, Any]) -> bool:
    """Whether a parsed `config.json` says that bitsandbytes quantised the weights."""
    settings = config.get("quantization_config") or {}
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    return getattr(method, "value", method) == "bitsandbytes"


def quantised_layers(hf_model: Any) -> dict[str, Any]:
    """Module name -> bitsandbytes layer, for a transformers model; empty if it has none.

    Raises:
        ValueError: a layer is not quantised yet (bitsandbytes packs the weights when a layer is moved to a device).
    """
    layers = {name: module for name, module in hf_model.named_modules() if type(module).__name__ in KINDS}
    waiting = [name for name, layer in layers.items() if layer.weight.dtype not in (torch.uint8, torch.int8)]
    if waiting:
        raise ValueError(
            f"{waiting[0]} and {len(waiting) - 1} more are bitsandbytes layers whose weights are not quantised yet, found "
            f"{layers[waiting[0]].weight.dtype}: load the model with quantization_config=, or move it to its device first."
        )
    return layers


def put_in(model: nn.Module, layers: Mapping[str, Any], table: Mapping[str, tuple[str, ...]], dtype: torch.dtype) -> None:
    """Replaces linear layers of the model by quantised layers.

    Args:
        layers: canonical module name -> layer. table: canonical weight name -> our parameters (`weights.conversion_table`).
    Raises:
        ValueError: a layer that does not correspond to a linear layer of the model, or has another shape.
    """
    for name, layer in layers.items():
        ours = table.get(f"{name}.weight", ())
        places = [place.removesuffix(".weight") for place in ours]
        if not places or not all(isinstance(model.get_submodule(place), nn.Linear) for place in places):
            raise ValueError(
                f"{name} is quantised, and has no linear layer's place here: quantise with llm_int8_skip_modules=[…, {name!r}], or load "
                f"the checkpoint that it was made from."
            )
        own: list[Any] = [model.get_submodule(place) for place in places]
        start, sizes = 0, [linear.out_features for linear in own]
        if (sum(sizes), own[0].in_features) != (layer.out_features, layer.in_features):
            raise ValueError(f"{name} is {layer.out_features} × {layer.in_features}; the configuration has {sum(sizes)} rows there.")
        for place, size in zip(places, sizes):
            model.set_submodule(place, Quantised(layer, slice(start, start + size), dtype))
            start += size


def refuse_editing(model: nn.Module, what: str) -> None:
    """Refuses an operation that changes weights in place.

    Raises:
        ValueError: some layers of the model are quantised.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, Quantised)]
    if names:
        raise ValueError(
            f"{what} needs plain weights, but {len(names)} layers are quantised by bitsandbytes, such as {names[0]}: load the checkpoint "
            f"they were made from, or hook a dequantised model: HookedQwen2VL.from_hf(hf_model.dequantize())."
        )


def load_reference(folder: Any, name: str, device: Any, dtype: torch.dtype | None) -> Any:
    """Loads a folder that bitsandbytes quantised as a transformers model, and checks that all its weights were used.

    Raises:
        ValueError: bitsandbytes is not installed, or weights are missing, unused or misshapen.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"{name} is quantised by bitsandbytes: pip install 'hooked-qwen2vl[bitsandbytes]' to run it as it is, or load the "
            f"checkpoint it was made from, in bfloat16."
        )
    from transformers import AutoModelForImageTextToText

    place = {"": str(device or "cpu")}
    load: Any = AutoModelForImageTextToText.from_pretrained  # returns a pair with output_loading_info=
    model, info = load(folder, dtype=dtype or "auto", device_map=place, output_loading_info=True, local_files_only=True)
    wrong = [
        f"{kind.removesuffix('_keys')}: {key}" for kind, keys in info.items() if kind.endswith("_keys") for key in sorted(map(str, keys))
    ]
    if wrong:
        raise ValueError(f"{name} does not hold the weights its configuration describes: {'; '.join(wrong[:10])}.")
    return model.eval()
