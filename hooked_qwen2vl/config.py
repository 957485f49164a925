"""HF's Qwen2-VL configuration as frozen numbers, and `model.cfg`, a TransformerLensConfig that carries them.

Axis words: `d_model` is the width of the text decoder's residual stream (HF `hidden_size`; HF's
`vision_config.hidden_size` is the merger's *output* and equals it); `d_vision` is the width of the
vision tower (HF `vision_config.embed_dim`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from transformer_lens.config import TransformerLensConfig
from transformers import PretrainedConfig, Qwen2VLConfig

ARCHITECTURE = "Qwen2VLForConditionalGeneration"
VISION_LAYER_NORM_EPS = 1e-6  # fixed in the reference code, not in the configuration

# Keys found in published Qwen2-VL configurations that say nothing about the computation.
_METADATA_KEYS = {
    "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype", "model_type", "use_cache",
    "initializer_range", "attention_dropout", "max_window_layers", "vision_token_id", "in_chans",
    "spatial_patch_size", "unsloth_fixed", "unsloth_version", "tokenizer_class", "processor_class",
}  # fmt: skip


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower and projector, in numbers."""

    n_layers: int
    d_vision: int
    n_heads: int
    d_head: int
    d_mlp: int
    d_out: int  # width of what the projector writes: the decoder's d_model
    in_channels: int
    patch_size: int  # pixels
    temporal_patch_size: int  # frames
    spatial_merge_size: int  # patches
    rotary_base: float
    eps: float = VISION_LAYER_NORM_EPS

    @property
    def d_patch(self) -> int:
        """Numbers in one flattened patch: channels × frames × height × width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def d_merge(self) -> int:
        """Width of a merge block: the concatenation of its patches."""
        return self.d_vision * self.spatial_merge_size**2


@dataclass(frozen=True)
class TextConfig:
    """The text decoder, in numbers."""

    n_layers: int
    d_model: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    eps: float
    rotary_base: float
    mrope_section: tuple[int, int, int]
    tie_word_embeddings: bool


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that frame the vision prefix, and of those that frame a chat.

    Attributes:
        line_breaks: tokens that begin with a line break; () where the tokenizer is not known.
        pad: what pads a row: the tokenizer's, without one the checkpoint's; None where neither names one.
    """

    image: int
    video: int
    vision_start: int
    vision_end: int
    eos: tuple[int, ...]
    line_breaks: tuple[int, ...] = ()
    pad: int | None = None


@dataclass(repr=False)
class HookedQwen2VLConfig(TransformerLensConfig):
    """`model.cfg`: what TransformerLens's tools read, with the frozen numbers of both halves.

    `cfg.text`, `cfg.vision` and `cfg.special` are frozen; the fields above them repeat the text
    decoder under TransformerLens's names.
    """

    text: TextConfig = field(default=None, kw_only=True)
    vision: VisionConfig = field(default=None, kw_only=True)
    special: SpecialTokens = field(default=None, kw_only=True)
    model_name: str = "Qwen2-VL"
    original_architecture: str = ARCHITECTURE
    tokenizer_name: str | None = None
    adapter: str | None = None  # what LoRA adapter is merged into the weights
    d_vocab_out: int = -1
    rotary_base: float = 1_000_000.0
    rotary_dim: int | None = None
    attn_scale: float = 1.0
    use_attn_scale: bool = True
    use_attn_in: bool = False
    use_hook_mlp_in: bool = False
    parallel_attn_mlp: bool = False
    attention_dir: str = "causal"
    default_padding_side: str = "left"
    n_devices: int = 1

    @property
    def image_token_id(self) -> int:
        return self.special.image

    @property
    def video_token_id(self) -> int:
        return self.special.video

    @property
    def vision_start_token_id(self) -> int:
        return self.special.vision_start

    @property
    def vision_end_token_id(self) -> int:
        return self.special.vision_end


def convert_config(
    config: dict[str, Any] | PretrainedConfig,
    name: str = "Qwen2-VL",
    generation: dict[str, Any] | None = None,
) -> HookedQwen2VLConfig:
    """Reads a Qwen2-VL configuration, old layout (flat) or new (with `text_config`).

    Args:
        config: the parsed `config.json`, or the configuration of a model in memory.
        name: what to call the model in results and errors.
        generation: the parsed `generation_config.json`; its end tokens go before the configuration's.
    Raises:
        ValueError: another architecture, an unknown key, or a value this port does not compute;
            each is named with its value.
    """
    config = config.to_dict() if isinstance(config, PretrainedConfig) else dict(config)
    _refuse_other_architectures(config, name)
    problems = _unknown_keys(config)
    hf = Qwen2VLConfig.from_dict(config)
    problems += _unsupported_values(hf)
    if problems:
        raise ValueError(
            f"{name}: this configuration asks for what hooked_qwen2vl does not compute, so its numbers would be "
            f"wrong:\n  " + "\n  ".join(problems)
        )
    text, vision, special = _text(hf), _vision(hf), _special(hf, generation or {})
    return HookedQwen2VLConfig(
        d_model=text.d_model,
        d_head=text.d_head,
        n_layers=text.n_layers,
        n_ctx=text.n_ctx,
        n_heads=text.n_heads,
        n_key_value_heads=text.n_key_value_heads,
        d_mlp=text.d_mlp,
        d_vocab=text.d_vocab,
        d_vocab_out=text.d_vocab,
        eps=text.eps,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        uses_rms_norm=True,
        final_rms=True,
        positional_embedding_type="rotary",
        default_prepend_bos=False,  # Qwen has no BOS; TransformerLens would prepend <|im_end|>
        rotary_base=text.rotary_base,
        rotary_dim=text.d_head,
        attn_scale=text.d_head**0.5,
        model_name=name,
        tokenizer_name=name,
        device="cpu",
        dtype=torch.float32,
        text=text,
        vision=vision,
        special=special,
    )


def _refuse_other_architectures(config: dict, name: str) -> None:
    model_type = config.get("model_type")
    architectures = config.get("architectures") or [ARCHITECTURE]
    if model_type == "qwen2_vl" and architectures == [ARCHITECTURE]:
        return
    hint = ""
    if model_type == "qwen2_5_vl":
        hint = " Qwen2.5-VL is not Qwen2-VL: its tower has window attention, RMSNorm and a gated MLP."
    raise ValueError(
        f"{name}: expected model_type 'qwen2_vl' with architectures ['{ARCHITECTURE}'], got model_type "
        f"{model_type!r} with architectures {architectures!r}.{hint} Load a Qwen2-VL checkpoint "
        f"(2B, 7B or 72B, base or instruct)."
    )


def _unknown_keys(config: dict) -> list[str]:
    """Keys that neither HF's Qwen2-VL configuration nor the published files know, with their values."""
    reference = Qwen2VLConfig().to_dict()
    text, vision = reference["text_config"], reference["vision_config"]
    text = {**text, "rope_theta": None, "rope_scaling": None}
    known = {**reference, **text}
    parts = [("", config, known)]
    for part, keys in (("text_config", text), ("vision_config", vision)):
        value = config.get(part) or {}
        value = value.to_dict() if isinstance(value, PretrainedConfig) else value
        parts.append((f"{part}.", value, {**PretrainedConfig().to_dict(), **keys, **reference}))
    return [
        f"{prefix}{key} = {value!r} (a key it does not know)"
        for prefix, values, names in parts
        for key, value in values.items()
        if key not in names and key not in _METADATA_KEYS and not key.startswith("_") and value is not None
    ]


def _unsupported_values(hf: Qwen2VLConfig) -> list[str]:
    """One line for each value the port does not compute."""
    text, vision, problems = hf.text_config, hf.vision_config, []

    def expect(holds: bool, key: str, value: Any, expected: str) -> None:
        if not holds:
            problems.append(f"{key} = {value!r} (expected {expected})")

    rope = text.rope_parameters or {}
    vision_base = (vision.rope_parameters or {}).get("rope_theta", 10_000.0)
    for key, value in (
        ("rms_norm_eps", text.rms_norm_eps), ("rope_theta", rope.get("rope_theta")),
        ("vision_config.rope_parameters.rope_theta", vision_base),
    ):  # fmt: skip
        expect(isinstance(value, Real) and 0 < value < float("inf"), key, value, "a number above 0")
    section = rope.get("mrope_section", [16, 24, 24])
    d_head = text.hidden_size // text.num_attention_heads
    head_dim = getattr(text, "head_dim", None)
    expect(text.hidden_act == "silu", "hidden_act", text.hidden_act, "'silu'")
    expect(not text.use_sliding_window, "use_sliding_window", text.use_sliding_window, "False")
    expect(
        all(kind == "full_attention" for kind in text.layer_types), "layer_types", text.layer_types, "full_attention"
    )
    expect(len(text.layer_types) == text.num_hidden_layers, "layer_types", text.layer_types, "one for each layer")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    expect(rope_type in ("default", "mrope"), "rope_scaling.type", rope_type, "'mrope' or 'default'")
    expect(
        len(section) == 3 and 2 * sum(section) == d_head,
        "rope_scaling.mrope_section",
        section,
        f"three numbers that sum to d_head / 2 = {d_head // 2}",
    )
    expect(
        text.hidden_size % text.num_attention_heads == 0 and head_dim in (None, d_head),
        "num_attention_heads",
        text.num_attention_heads,
        f"a divisor of hidden_size = {text.hidden_size}, and no head_dim of its own (got {head_dim})",
    )
    expect(
        text.num_attention_heads % text.num_key_value_heads == 0,
        "num_key_value_heads",
        text.num_key_value_heads,
        f"a divisor of num_attention_heads = {text.num_attention_heads}",
    )
    expect(vision.hidden_act == "quick_gelu", "vision_config.hidden_act", vision.hidden_act, "'quick_gelu'")
    expect(
        vision.embed_dim % (4 * vision.num_heads) == 0,
        "vision_config.num_heads",
        vision.num_heads,
        f"embed_dim = {vision.embed_dim} split into heads whose width is a multiple of 4 (2-D rotary)",
    )
    expect(
        vision.hidden_size == text.hidden_size,
        "vision_config.hidden_size",
        vision.hidden_size,
        f"the decoder's hidden_size = {text.hidden_size}",
    )
    for key in ("patch_size", "temporal_patch_size"):
        expect(isinstance(getattr(vision, key), int), f"vision_config.{key}", getattr(vision, key), "one number")
    vision_rope = (vision.rope_parameters or {}).get("rope_type", "axial")
    expect(vision_rope == "axial", "vision_config.rope_parameters.rope_type", vision_rope, "'axial'")
    quantization = getattr(hf, "quantization_config", None)
    expect(quantization is None, "quantization_config", quantization, "none: load the checkpoint it was made from")
    return problems


def _text(hf: Qwen2VLConfig) -> TextConfig:
    text, rope = hf.text_config, hf.text_config.rope_parameters
    return TextConfig(
        n_layers=text.num_hidden_layers,
        d_model=text.hidden_size,
        n_heads=text.num_attention_heads,
        n_key_value_heads=text.num_key_value_heads,
        d_head=text.hidden_size // text.num_attention_heads,
        d_mlp=text.intermediate_size,
        d_vocab=text.vocab_size,
        n_ctx=text.max_position_embeddings,
        eps=text.rms_norm_eps,
        rotary_base=float(rope["rope_theta"]),
        mrope_section=tuple(rope.get("mrope_section", (16, 24, 24))),
        tie_word_embeddings=bool(hf.tie_word_embeddings),
    )


def _vision(hf: Qwen2VLConfig) -> VisionConfig:
    vision = hf.vision_config
    return VisionConfig(
        n_layers=vision.depth,
        d_vision=vision.embed_dim,
        n_heads=vision.num_heads,
        d_head=vision.embed_dim // vision.num_heads,
        d_mlp=int(vision.embed_dim * vision.mlp_ratio),
        d_out=vision.hidden_size,
        in_channels=vision.in_channels,
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        spatial_merge_size=vision.spatial_merge_size,
        rotary_base=float((vision.rope_parameters or {}).get("rope_theta", 10_000.0)),
    )


def _special(hf: Qwen2VLConfig, generation: dict[str, Any]) -> SpecialTokens:
    eos = generation.get("eos_token_id", hf.text_config.eos_token_id)
    return SpecialTokens(
        image=hf.image_token_id,
        video=hf.video_token_id,
        vision_start=hf.vision_start_token_id,
        vision_end=hf.vision_end_token_id,
        eos=() if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,),
        pad=generation.get("pad_token_id", hf.text_config.pad_token_id),
    )
