"""Maps HF's parameter names to ours, and loads weights completely or not at all.

Nothing is copied: our parameters are the checkpoint's tensors, or slices of their rows (for the tower's fused q, k, v).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor, nn

from .config import HookedQwen2VLConfig, TextConfig
from .quantised import put_in

# HF name (new layout, without the prefix "model.") -> the parameters of ours that share its storage.
TEXT_TABLE = {
    "language_model.embed_tokens.weight": ("embed.weight",),
    "language_model.norm.weight": ("ln_final.w",),
    "language_model.layers.{l}.input_layernorm.weight": ("blocks.{l}.ln1.w",),
    "language_model.layers.{l}.self_attn.q_proj.weight": ("blocks.{l}.attn.q_proj.weight",),
    "language_model.layers.{l}.self_attn.k_proj.weight": ("blocks.{l}.attn.k_proj.weight",),
    "language_model.layers.{l}.self_attn.v_proj.weight": ("blocks.{l}.attn.v_proj.weight",),
    "language_model.layers.{l}.self_attn.o_proj.weight": ("blocks.{l}.attn.o_proj.weight",),
    "language_model.layers.{l}.post_attention_layernorm.weight": ("blocks.{l}.ln2.w",),
    "language_model.layers.{l}.mlp.gate_proj.weight": ("blocks.{l}.mlp.gate_proj.weight",),
    "language_model.layers.{l}.mlp.up_proj.weight": ("blocks.{l}.mlp.up_proj.weight",),
    "language_model.layers.{l}.mlp.down_proj.weight": ("blocks.{l}.mlp.down_proj.weight",),
}
QKV_BIASES = {f"language_model.layers.{{l}}.self_attn.{part}_proj.bias": (f"blocks.{{l}}.attn.{part}_proj.bias",) for part in "qkv"}
QK_NORMS = {f"language_model.layers.{{l}}.self_attn.{part}_norm.weight": (f"blocks.{{l}}.attn.{part}_norm.w",) for part in "qk"}


def text_table(cfg: TextConfig) -> dict[str, tuple[str, ...]]:
    """The decoder's table, with {l} for the layer."""
    return {**TEXT_TABLE, **(QKV_BIASES if cfg.qkv_bias else {}), **(QK_NORMS if cfg.qk_norm else {})}


def _linear(theirs: str, *ours: str) -> dict[str, tuple[str, ...]]:
    """Entries for weight and bias of a linear layer; several of ours share a fused layer."""
    return {f"{theirs}.{part}": tuple(f"{name}.{part}" for name in ours) for part in ("weight", "bias")}


def _layer_norm(theirs: str, ours: str) -> dict[str, tuple[str, ...]]:
    return {f"{theirs}.weight": (f"{ours}.w",), f"{theirs}.bias": (f"{ours}.b",)}


_BLOCK, _OURS = "visual.blocks.{l}", "vision_encoder.blocks.{l}"
_TOWER = {
    "visual.patch_embed.proj.weight": ("vision_encoder.patch_embed.weight",),
    **_linear(f"{_BLOCK}.attn.qkv", *(f"{_OURS}.attn.{part}_proj" for part in "qkv")),
    **_linear(f"{_BLOCK}.attn.proj", f"{_OURS}.attn.o_proj"),
}
VISION_TABLES = {
    "qwen2_vl": {
        **_TOWER,
        **_layer_norm(f"{_BLOCK}.norm1", f"{_OURS}.ln1"),
        **_layer_norm(f"{_BLOCK}.norm2", f"{_OURS}.ln2"),
        **_linear(f"{_BLOCK}.mlp.fc1", f"{_OURS}.mlp.fc1"),
        **_linear(f"{_BLOCK}.mlp.fc2", f"{_OURS}.mlp.fc2"),
        **_layer_norm("visual.merger.ln_q", "vision_projector.ln"),
        **_linear("visual.merger.mlp.0", "vision_projector.fc1"),
        **_linear("visual.merger.mlp.2", "vision_projector.fc2"),
    },
    "qwen2_5_vl": {
        **_TOWER,
        f"{_BLOCK}.norm1.weight": (f"{_OURS}.ln1.w",),
        f"{_BLOCK}.norm2.weight": (f"{_OURS}.ln2.w",),
        **_linear(f"{_BLOCK}.mlp.gate_proj", f"{_OURS}.mlp.gate_proj"),
        **_linear(f"{_BLOCK}.mlp.up_proj", f"{_OURS}.mlp.up_proj"),
        **_linear(f"{_BLOCK}.mlp.down_proj", f"{_OURS}.mlp.down_proj"),
        "visual.merger.ln_q.weight": ("vision_projector.ln.w",),
        **_linear("visual.merger.mlp.0", "vision_projector.fc1"),
        **_linear("visual.merger.mlp.2", "vision_projector.fc2"),
    },
    "qwen3_vl": {
        **_TOWER,
        "visual.patch_embed.proj.bias": ("vision_encoder.patch_embed.bias",),
        "visual.pos_embed.weight": ("vision_encoder.pos_embed.weight",),
        **_layer_norm(f"{_BLOCK}.norm1", f"{_OURS}.ln1"),
        **_layer_norm(f"{_BLOCK}.norm2", f"{_OURS}.ln2"),
        **_linear(f"{_BLOCK}.mlp.linear_fc1", f"{_OURS}.mlp.fc1"),
        **_linear(f"{_BLOCK}.mlp.linear_fc2", f"{_OURS}.mlp.fc2"),
        **_layer_norm("visual.merger.norm", "vision_projector.ln"),
        **_linear("visual.merger.linear_fc1", "vision_projector.fc1"),
        **_linear("visual.merger.linear_fc2", "vision_projector.fc2"),
    },
}
DEEPSTACK_TABLE = {
    **_layer_norm("visual.deepstack_merger_list.{l}.norm", "vision_projector.deepstack.{l}.ln"),
    **_linear("visual.deepstack_merger_list.{l}.linear_fc1", "vision_projector.deepstack.{l}.fc1"),
    **_linear("visual.deepstack_merger_list.{l}.linear_fc2", "vision_projector.deepstack.{l}.fc2"),
}
LM_HEAD, EMBEDDING = "lm_head.weight", "language_model.embed_tokens.weight"
# Tensors that quantisers store in addition to or instead of a weight: GPTQ, AWQ, bitsandbytes, compressed-tensors, FP8.
_PACKED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|weight_format|absmax|quant_map|nested_absmax|nested_quant_map|weight_packed|"
    r"(weight|input)_(scale|scale_inv|zero_point)|weight\.(absmax|quant_map|nested_\w+|quant_state\..+))$"
)
_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The reference's output projection has no bias; ours is zero until value biases are folded into it.
OUR_ZEROS = re.compile(r"^blocks\.\d+\.attn\.o_proj\.bias$")


def canonical(name: str) -> str:
    """An HF parameter name in the new layout, without "model."; the old layout has `model.layers.0…` and `visual.…`."""
    name = name.removeprefix("model.")
    if name.startswith(("visual.", "language_model.", "lm_head.")):
        return name
    return f"language_model.{name}"


def canonical_tensors(cfg: HookedQwen2VLConfig, source: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Canonical name -> tensor; if only the head of a tied model is stored, it is also used as the embedding.

    Raises:
        ValueError: all names have a prefix that checkpoints do not have, or a tensor is stored under the names of both layouts with
            different values.
    """
    tensors: dict[str, Tensor] = {}
    first: dict[str, str] = {}
    for name, tensor in source.items():
        known = canonical(name)
        if known in tensors and not _same(tensors[known], tensor):
            raise ValueError(
                f"{where} holds one weight twice, with different numbers: {first[known]} and {name}; remove the one that is stale."
            )
        tensors.setdefault(known, tensor)
        first.setdefault(known, name)
    _refuse_prefix(first.values(), conversion_table(cfg), where)
    if cfg.text.tie_word_embeddings and LM_HEAD in tensors:
        tensors.setdefault(EMBEDDING, tensors[LM_HEAD])
    return tensors


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and (one.data_ptr() == other.data_ptr() or torch.equal(one, other))


def _refuse_prefix(names: Iterable[str], table: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for weights of a wrapped model, whose names would be right without a common prefix."""
    names = list(names)
    prefix = commonprefix(names)

    def known_without(cut: str) -> int:
        return sum(canonical(name.removeprefix(cut)) in table for name in names)

    cuts = ["", *(prefix[: found.end()] for found in re.finditer(r"\.", prefix))]
    if cut := max(cuts, key=known_without):  # the shortest of the best
        raise ValueError(
            f"{where}: every weight's name begins with {cut!r}, so it was saved from a wrapper (DataParallel, torch.compile, an "
            f"unmerged adapter), and transformers would not load it: save the model inside, or take the prefix away."
        )


def few(names: Iterable[str], most: int = 10, between: str = ", ") -> str:
    """The first names as text, with the number of further ones."""
    names = list(names)
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return between.join([*names[:most], *more])


def conversion_table(cfg: HookedQwen2VLConfig) -> dict[str, tuple[str, ...]]:
    """Canonical HF name -> our parameter names, for all layers."""
    table = {
        **_unroll(text_table(cfg.text), cfg.text.n_layers),
        **_unroll(VISION_TABLES[cfg.vision.tower], cfg.vision.n_layers),
        **_unroll(DEEPSTACK_TABLE, len(cfg.vision.deepstack_layers)),
    }
    return table if cfg.text.tie_word_embeddings else {**table, LM_HEAD: ("unembed.weight",)}


def _unroll(table: Mapping[str, tuple[str, ...]], n_layers: int) -> dict[str, tuple[str, ...]]:
    return {
        theirs.format(l=layer): tuple(name.format(l=layer) for name in ours)
        for theirs, ours in table.items()
        for layer in (range(n_layers) if "{l}" in theirs else (0,))
    }


def refuse_quantised(config: Mapping[str, Any], where: str) -> None:
    """Refuses a configuration of quantised weights.

    Args:
        config: the parsed `config.json`, or `hf_model.config.to_dict()`.
        where: name of the model in the error.
    Raises:
        ValueError: the configuration, or its text or vision part, has a `quantization_config`.
    """
    halves = [config, *(config.get(half) for half in ("text_config", "vision_config"))]
    stated = (half.get("quantization_config") for half in halves if isinstance(half, Mapping))
    settings = next((settings for settings in stated if settings), None)
    if settings is None:
        return
    settings = settings.to_dict() if hasattr(settings, "to_dict") else settings
    settings = settings if isinstance(settings, Mapping) else {"quant_method": str(settings)[:80]}
    bits = next((n for n in (8, 4) if settings.get(f"load_in_{n}bit")), settings.get("bits"))
    method = settings.get("quant_method", "unknown method")
    method = getattr(method, "value", method)
    raise ValueError(_quantised(where, f"quantization_config: {method}" + (f", {bits} bits" if bits else "")))


def _packed(tensors: Mapping[str, Tensor], table: Mapping[str, Any]) -> list[str]:
    """Descriptions of the tensors that are not plain weights."""
    names = [f"{name} (packed)" for name in tensors if name not in table and _PACKED.search(name)]
    for name in table:
        if (tensor := tensors.get(name)) is not None:
            if tensor.dtype not in _PLAIN:
                names.append(f"{name} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}")
            elif type(tensor) not in (Tensor, nn.Parameter):
                names.append(f"{name} is a {type(tensor).__name__}")
    return names


def _quantised(where: str, what: str) -> str:
    return (
        f"{where} is quantised ({what}): its weights are no plain tensors that hooks and W_Q, W_O, … could be views of, so "
        f"nothing was loaded. Load the checkpoint it was made from, in bfloat16; or dequantise it with transformers and "
        f"hook that: HookedQwen2VL.from_hf(hf_model.dequantize())."
    )


def load_weights(
    model: Any, source: Mapping[str, Tensor], where: str, dtype: torch.dtype | None = None, layers: Mapping[str, nn.Module] | None = None
) -> None:
    """Sets all parameters of the model to the tensors of a source, or changes nothing.

    Args:
        model: a HookedQwen2VL whose parameters are on the meta device.
        source: HF name (old or new layout) -> tensor; the model's parameters share its storage.
        where: name of the source in errors.
        dtype: to which the caller casts the model afterwards; None: no cast, and then all weights must have the same dtype.
        layers: HF module name -> layer quantised by bitsandbytes, which replaces ours.
    Raises:
        ValueError: the weights are quantised, of several dtypes, or of a wrapped model; or names are missing, unused, or have other
            shapes (the message lists the first ten). With tied embeddings, a stored `lm_head.weight` must equal the embedding, or
            be stored instead of it.
    """
    tensors = canonical_tensors(model.cfg, source, where)
    table = conversion_table(model.cfg)
    if layers:
        quantised = {canonical(f"{name}."): layer for name, layer in layers.items()}
        rest = [name for name in tensors if not name.startswith(tuple(quantised))]
        put_in(model, {name[:-1]: layer for name, layer in quantised.items()}, table, tensors[EMBEDDING].dtype)
        table = {name: ours for name, ours in table.items() if not name.startswith(tuple(quantised))}
        tensors = {name: tensors[name] for name in rest}
    if packed := _packed(tensors, table):
        more = f", and {len(packed) - 3} more" if len(packed) > 3 else ""
        raise ValueError(_quantised(where, ", ".join(packed[:3]) + more))
    problems = [f"missing: {name}" for name in table if name not in tensors]
    problems += [f"unused: {name}" for name in tensors if name not in table and name != LM_HEAD]
    problems += _check_head(model.cfg, tensors)
    assigned: dict[str, Tensor] = {}
    for theirs, ours in table.items():
        if theirs in tensors:
            problems += _assign(model, theirs, tensors[theirs], ours, assigned)
    if problems:
        raise ValueError(
            f"{where} does not hold the weights its configuration describes, so nothing was loaded:\n  " + few(problems, between="\n  ")
        )
    if dtype is None:
        _refuse_mixture({name: tensors[name] for name in table}, where)
    for name, _ in list(model.named_parameters()):
        if OUR_ZEROS.match(name):
            assigned[name] = torch.zeros_like(assigned[name.replace("bias", "weight")][:, 0].contiguous())
    install(model, assigned)


def _refuse_mixture(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises ValueError for weights of several dtypes: the model computes in one, which the user must choose."""
    by_dtype: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        by_dtype.setdefault(str(tensor.dtype).removeprefix("torch."), []).append(name)
    if len(by_dtype) > 1:
        said = ", ".join(f"{len(names)} of {dtype} (such as {names[0]})" for dtype, names in sorted(by_dtype.items()))
        raise ValueError(
            f"{where} mixes weights of several dtypes: {said}. Pass dtype= (say dtype={max(by_dtype, key=lambda d: len(by_dtype[d]))!r}) to "
            f"cast them all, as transformers does; a model in memory: hf_model.to(dtype) first."
        )


def _check_head(cfg: HookedQwen2VLConfig, tensors: Mapping[str, Tensor]) -> Iterable[str]:
    if not cfg.text.tie_word_embeddings or LM_HEAD not in tensors or EMBEDDING not in tensors:
        return []
    head, embedding = tensors[LM_HEAD], tensors[EMBEDDING]
    if head.data_ptr() == embedding.data_ptr() or torch.equal(head, embedding):
        return []
    return [
        f"unused: {LM_HEAD} (tie_word_embeddings is true, so the head is the embedding, but the stored head differs "
        f"from it; set tie_word_embeddings to false to use the stored one)"
    ]


def _assign(model: Any, theirs: str, tensor: Tensor, ours: tuple[str, ...], assigned: dict[str, Tensor]) -> list[str]:
    """Splits one tensor of the source into our parameters; returns a problem if its shape is wrong."""
    shapes = [tuple(model.get_parameter(name).shape) for name in ours]
    expected = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    if theirs == "visual.patch_embed.proj.weight":  # stored as a Conv3d whose stride equals its kernel, which is a matmul
        vision = model.cfg.vision
        side = vision.patch_size
        expected = (vision.d_vision, vision.in_channels, vision.temporal_patch_size, side, side)
    if tuple(tensor.shape) != expected:
        return [f"misshapen: {theirs} is {tuple(tensor.shape)}, expected {expected}"]
    parts = tensor.reshape(expected[0], *shapes[0][1:]).split([shape[0] for shape in shapes])
    assigned.update(zip(ours, parts))
    return []


def install(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Sets parameters of the model to these tensors, without copying; a tied head remains tied to the embedding."""
    tied = model.unembed.weight is model.embed.weight
    for name, tensor in tensors.items():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, nn.Parameter(tensor))
    if tied:
        model.unembed.weight = model.embed.weight
