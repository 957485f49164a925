"""Linear layers that bitsandbytes quantised, as they are: its own kernels run, and what is read of them is dequantised.

The reference's modules (`Linear4bit`, `Linear8bitLt`) take the place of ours. `W_Q`, `W_in`, … are made anew at each reading
and refuse to be written: a number put there could not run.
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
    """A quantised linear layer of the reference's, or some rows of it: the tower's queries, keys and values are one layer there.

    Args:
        layer: bitsandbytes' module, shared with the reference. rows: of its output; a part computes the whole layer.
        dtype: of the activations, in which biases and dequantised weights are read.
    """

    def __init__(self, layer: Any, rows: slice, dtype: torch.dtype):
        super().__init__()
        self.layer, self.rows, self.dtype = layer, rows, dtype
        self.in_features, self.out_features = layer.in_features, len(range(*rows.indices(layer.out_features)))

    def forward(self, x: Float[Tensor, "*axes d_in"]) -> Float[Tensor, "*axes d_out"]:
        flat = self.layer(x.flatten(0, -2))  # its kernels know two and three axes
        return flat[:, self.rows].unflatten(0, x.shape[:-1])

    def dequantised(self) -> Float[Tensor, "out in"]:
        """The numbers that the packed weight stands for, in a copy."""
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        return dequantize_bnb_weight(self.layer.weight, getattr(self.layer, "state", None)).to(self.dtype)[self.rows]

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """As `dequantised`; writing into it is torch's error about inference tensors (`.clone()` gives a free copy)."""
        with torch.inference_mode():
            return self.dequantised()

    @property
    def bias(self) -> Float[Tensor, "out"]:
        """The layer's, or zeros that refuse to be written."""
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
    """Module name -> layer of bitsandbytes', in a reference model; empty where none is quantised and holds its numbers.

    Raises:
        ValueError: a layer that is not quantised yet (its packing is done when it is moved to a device).
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
    """Gives the quantised layers the places of the model's own.

    Args:
        layers: canonical module name -> layer. table: canonical weight name -> our parameters (`weights.conversion_table`).
    Raises:
        ValueError: a layer has no place here, or another shape.
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
    """Refuses what needs plain weights in place.

    Raises:
        ValueError: some of the model's layers are quantised.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, Quantised)]
    if names:
        raise ValueError(
            f"{what} needs plain weights, but {len(names)} layers are quantised by bitsandbytes, such as {names[0]}: load the checkpoint "
            f"they were made from, or hook a dequantised model: HookedQwen2VL.from_hf(hf_model.dequantize())."
        )


def load_reference(folder: Any, name: str, device: Any, dtype: torch.dtype | None) -> Any:
    """transformers' model of a folder that bitsandbytes quantised, every weight of which it has used.

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
    load: Any = AutoModelForImageTextToText.from_pretrained  # with output_loading_info= it gives two
    model, info = load(folder, dtype=dtype or "auto", device_map=place, output_loading_info=True, local_files_only=True)
    wrong = [
        f"{kind.removesuffix('_keys')}: {key}" for kind, keys in info.items() if kind.endswith("_keys") for key in sorted(map(str, keys))
    ]
    if wrong:
        raise ValueError(f"{name} does not hold the weights its configuration describes: {'; '.join(wrong[:10])}.")
    return model.eval()
