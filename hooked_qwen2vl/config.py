"""Reads HF's configuration into frozen dataclasses, and into `model.cfg`, a TransformerLensConfig that contains them.

Three model types are supported: Qwen2-VL, Qwen2.5-VL and Qwen3-VL (`FAMILIES`). Their differences are numbers and flags of
`VisionConfig` and `TextConfig`, from which the parts of the model are chosen.

`d_model` is the width of the decoder's residual stream and of the projector's output. HF calls it `hidden_size` in the text
configuration; in the vision configuration it is `hidden_size` for Qwen2-VL and `out_hidden_size` for its successors. `d_vision`
is the width of the vision tower: HF's `embed_dim` for Qwen2-VL, `hidden_size` for its successors.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, cast

import torch
from transformer_lens.config import TransformerLensConfig
from transformers import PretrainedConfig, Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

ARCHITECTURE = "Qwen2VLForConditionalGeneration"
VISION_LAYER_NORM_EPS = 1e-6  # fixed in the reference code, not in the configuration

# Keys in published configurations, and in those that trainers write, that do not affect the computation.
_METADATA_KEYS = {
    "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype", "model_type", "use_cache",
    "initializer_range", "attention_dropout", "max_window_layers", "vision_token_id", "in_chans",
    "spatial_patch_size", "unsloth_fixed", "unsloth_version", "tokenizer_class", "processor_class", "tokenizer_padding_side",
    "tokenizer_model_max_length", "gradient_checkpointing", "attn_implementation", "keys_to_ignore_at_inference",
    "output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id", "finetuning_task", "problem_type", "name_or_path",
}  # fmt: skip
_METADATA = re.compile(r"_.*|unsloth_.*|(\w+_)?(lr|learning_rate)|(freeze|tune)_\w+")
# Keys that transformers 4 wrote for every model, with the value that has no effect. Other values are refused.
_INERT = {
    "torchscript": False, "pruned_heads": {}, "use_bfloat16": False, "tf_legacy_loss": False, "tie_encoder_decoder": False,
    "add_cross_attention": False, "is_decoder": False, "is_encoder_decoder": False, "chunk_size_feed_forward": 0, "temperature": 1.0,
    "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "diversity_penalty": 0.0,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1,
    "max_length": 20, "min_length": 0, "do_sample": False, "early_stopping": False, "output_scores": False,
    "return_dict_in_generate": False, "remove_invalid_values": False,
}  # fmt: skip
# Keys of whole numbers, with the largest plausible value; larger ones are refused before they take time and memory.
_COUNTS = {
    "num_hidden_layers": 1000, "depth": 1000, "hidden_size": 10**6, "embed_dim": 10**6, "out_hidden_size": 10**6,
    "intermediate_size": 10**7, "num_attention_heads": 10**5, "num_key_value_heads": 10**5, "num_heads": 10**5, "head_dim": 10**5,
    "vocab_size": 10**7, "max_position_embeddings": 10**9, "in_channels": 1000, "in_chans": 1000, "spatial_merge_size": 100, "patch_size": 10**4,
    "temporal_patch_size": 100, "window_size": 10**6, "num_position_embeddings": 10**8,
}  # fmt: skip
_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_FLAGS = ("tie_word_embeddings", "use_sliding_window", "attention_bias")


@dataclass(frozen=True)
class VisionConfig:
    """Sizes and flags of the vision tower and the projector."""

    n_layers: int
    d_vision: int
    n_heads: int
    d_head: int
    d_mlp: int
    d_out: int  # width of the projector's output: the decoder's d_model
    in_channels: int
    patch_size: int  # pixels
    temporal_patch_size: int  # frames
    spatial_merge_size: int  # patches
    rotary_base: float
    eps: float = VISION_LAYER_NORM_EPS
    tower: str = "qwen2_vl"  # architecture of the tower: "qwen2_vl", "qwen2_5_vl" or "qwen3_vl"
    window: int | None = None  # side of an attention window, in image tokens; None: attention over the whole image
    full_attention_layers: tuple[int, ...] = ()  # with windows: blocks whose attention is over the whole image
    tokens_per_second: float | None = None  # time positions per second of video; None: one per frame
    position_side: int | None = None  # side of the grid of learned position embeddings
    deepstack_layers: tuple[int, ...] = ()  # tower blocks whose merged streams are added after the decoder's first blocks
    timestamps: bool = False  # whether the prompt has the time of every frame of a video as text before it
    layer_norm: bool = True  # True: LayerNorm in the tower; False: RMSNorm

    @property
    def needs_fps(self) -> bool:
        """Whether a prompt with a video depends on its frames per second."""
        return self.timestamps or self.tokens_per_second is not None

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
    """Sizes and flags of the text decoder."""

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
    mrope_interleaved: bool = False  # frequencies alternate (t, row, col, t, …) instead of coming in sections
    qkv_bias: bool = True
    qk_norm: bool = False  # RMSNorm of every head's query and key


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of special tokens.

    Attributes:
        line_breaks: tokens that begin with a line break; () without a tokenizer.
        pad: the padding token of the tokenizer, else of the checkpoint; None if neither has one.
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
    """`model.cfg`: a TransformerLensConfig for the text decoder, with the frozen configurations `text`, `vision` and `special`.

    The other fields repeat `cfg.text` under TransformerLens's names.
    """

    text: TextConfig = field(default=cast(Any, None), kw_only=True)
    vision: VisionConfig = field(default=cast(Any, None), kw_only=True)
    special: SpecialTokens = field(default=cast(Any, None), kw_only=True)
    model_name: str = "Qwen2-VL"
    original_architecture: str = ARCHITECTURE
    tokenizer_name: str | None = None
    adapter: str | None = None  # name of the LoRA adapter that is merged into the weights
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
    def n_params(self) -> int:
        """Number of parameters as TransformerLens counts them: the matrices of the decoder's blocks, no biases, norms or embeddings."""
        heads = 2 * (self.n_heads + cast(int, self.n_key_value_heads))
        return self.n_layers * self.d_model * (heads * self.d_head + 3 * cast(int, self.d_mlp))

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
    """Reads the configuration of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL, in the old (flat) or the new layout (with `text_config`).

    Args:
        config: the parsed `config.json`, or the configuration of a model in memory.
        name: the model's name in results and errors.
        generation: the parsed `generation_config.json`; its end tokens have precedence over the configuration's.
    Raises:
        ValueError: another architecture, an unknown key, or a value that this package does not support; the message lists all of
            them.
    """
    config = config.to_dict() if isinstance(config, PretrainedConfig) else dict(config)
    family = _family(config, name)
    _refuse_impossible(config, name)
    problems = _unknown_keys(config, family)
    try:
        hf = family.config.from_dict(config)
    except Exception as error:  # transformers checks some values itself, with errors of several libraries
        raise ValueError(f"{name}: transformers cannot read this configuration ({' '.join(str(error).split())[:200]}).") from error
    problems += _unsupported_values(hf) + family.unsupported(hf)
    if problems:
        raise ValueError(
            f"{name}: this configuration asks for what hooked_qwen2vl does not compute, so its numbers would be "
            f"wrong:\n  " + "\n  ".join(problems)
        )
    text, vision, special = family.text(hf), family.vision(hf), _special(hf, generation or {})
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
        original_architecture=family.architecture,
        tokenizer_name=name,
        device="cpu",
        dtype=torch.float32,
        text=text,
        vision=vision,
        special=special,
    )


def _refuse_impossible(config: dict, name: str) -> None:
    """Checks types and sizes of values before they are used.

    Raises:
        ValueError: wrong types, or sizes that no model has; the message lists them.
    """
    problems = _Problems()
    for prefix in ("", "text_config", "vision_config"):
        part = config.get(prefix) if prefix else config
        part = part.to_dict() if isinstance(part, PretrainedConfig) else part
        if part is None:
            continue
        if not isinstance(part, dict):
            problems.append(f"{prefix} is a {type(part).__name__} (expected an object)")
            continue
        said = {f"{prefix}.{key}" if prefix else key: (key, value) for key, value in part.items() if value is not None}
        for where, (key, value) in said.items():
            whole = isinstance(value, int) and not isinstance(value, bool)
            if key in _COUNTS:
                problems.expect(whole and 1 <= value <= _COUNTS[key], where, value, f"a whole number in 1..{_COUNTS[key]}")
            elif key in _IDS:
                problems.expect(whole and value >= 0, where, value, "a token's id")
            elif key in _FLAGS:
                problems.expect(isinstance(value, bool), where, value, "true or false")
            elif key in ("rope_scaling", "rope_parameters"):
                section = value.get("mrope_section", [1]) if isinstance(value, dict) else None
                problems.expect(_are_counts(section, least=0), where, value, "an object, with whole numbers in its mrope_section")
            elif key == "mlp_ratio":
                problems.expect(isinstance(value, Real) and 0 < cast(Any, value) <= 1000, where, value, "a number above 0")
            elif key in ("fullatt_block_indexes", "deepstack_visual_indexes"):
                problems.expect(_are_counts(value, least=0), where, value, "a list of blocks")
    if problems:
        raise ValueError(f"{name}: this configuration describes no model: {'; '.join(problems[:10])}.")


def _are_counts(values: Any, least: int = 1) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(n, int) and not isinstance(n, bool) and n >= least for n in values)


def _family(config: dict, name: str) -> Family:
    """The `Family` of a configuration; ValueError if the model type is not supported."""
    model_type = str(config.get("model_type"))
    family = FAMILIES.get(model_type)
    architectures = config.get("architectures") or ([family.architecture] if family else [])
    if family is not None and architectures == [family.architecture]:
        return family
    known = ", ".join(f"{key!r} ({family.architecture})" for key, family in FAMILIES.items())
    why = f" {_REFUSED[model_type]}" if model_type in _REFUSED else ""
    raise ValueError(
        f"{name}: expected model_type {known}; got model_type {model_type!r} with architectures {architectures!r}.{why} "
        f"Load a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint (base, instruct or thinking)."
    )


def _unknown_keys(config: dict, family: Family) -> list[str]:
    """One line for each key that is neither in HF's configuration of this type nor in published files, with its value."""
    reference = family.config().to_dict()
    text, vision = reference["text_config"], reference["vision_config"]
    text = {**text, **dict.fromkeys(("rope_theta", "rope_scaling", "eos_token_id", "bos_token_id", "pad_token_id"))}
    known = {**reference, **text}
    parts = [("", config, known)]
    for part, keys in (("text_config", text), ("vision_config", vision)):
        value = config.get(part) or {}
        value = value.to_dict() if isinstance(value, PretrainedConfig) else value
        parts.append((f"{part}.", value, {**PretrainedConfig().to_dict(), **keys, **reference}))
    return [
        f"{prefix}{key} = {_brief(value)} " + (f"(expected {_INERT[key]!r})" if key in _INERT else "(a key it does not know)")
        for prefix, values, names in parts
        for key, value in values.items()
        if key not in names and key not in _METADATA_KEYS and not _METADATA.fullmatch(key) and value is not None
        and not (key in _INERT and value == _INERT[key] and isinstance(value, bool) == isinstance(_INERT[key], bool))
    ]  # fmt: skip


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:110]}…"


class _Problems(list):
    """A list with one line for each unsupported value."""

    def expect(self, holds: bool, key: str, value: Any, expected: str) -> None:
        if not holds:
            self.append(f"{key} = {_brief(value)} (expected {expected})")


def _unsupported_values(hf: Any) -> list[str]:
    """One line for each unsupported value; checks that are the same for all model types."""
    text, vision, problems = hf.text_config, hf.vision_config, _Problems()
    expect = problems.expect
    rope = text.rope_parameters or {}
    for key, value in (
        ("rms_norm_eps", text.rms_norm_eps), ("rope_theta", rope.get("rope_theta")),
        ("vision_config.rope_parameters.rope_theta", _vision_base(vision)),
    ):  # fmt: skip
        expect(isinstance(value, Real) and 0 < cast(Any, value) < float("inf"), key, value, "a number above 0")
    section = rope.get("mrope_section", [16, 24, 24])
    d_head = _d_head(text)
    expect(text.hidden_act == "silu", "hidden_act", text.hidden_act, "'silu'")
    expect(not getattr(text, "use_sliding_window", False), "use_sliding_window", getattr(text, "use_sliding_window", None), "False")
    layer_types = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    expect(all(kind == "full_attention" for kind in layer_types), "layer_types", layer_types, "full_attention")
    expect(len(layer_types) == text.num_hidden_layers, "layer_types", layer_types, "one for each layer")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    expect(rope_type in ("default", "mrope"), "rope_scaling.type", rope_type, "'mrope' or 'default'")
    expect(
        len(section) == 3 and 2 * sum(section) == d_head,
        "rope_scaling.mrope_section",
        section,
        f"three numbers that sum to d_head / 2 = {d_head // 2}",
    )
    expect(
        text.num_attention_heads % text.num_key_value_heads == 0,
        "num_key_value_heads",
        text.num_key_value_heads,
        f"a divisor of num_attention_heads = {text.num_attention_heads}",
    )
    for key in ("patch_size", "temporal_patch_size"):
        expect(isinstance(getattr(vision, key), int), f"vision_config.{key}", getattr(vision, key), "one number")
    vision_rope = (vision.rope_parameters or {}).get("rope_type", "axial")
    expect(vision_rope == "axial", "vision_config.rope_parameters.rope_type", vision_rope, "'axial'")
    quantization = getattr(hf, "quantization_config", None)
    expect(quantization is None, "quantization_config", quantization, "none: load the checkpoint it was made from")
    return problems


def _expect_heads_of_the_stream(text: Any, expect: Callable) -> None:
    """Checks for Qwen2's decoder: n_heads · d_head = d_model, and M-RoPE in sections."""
    head_dim, rope = getattr(text, "head_dim", None), text.rope_parameters or {}
    expect(
        text.hidden_size % text.num_attention_heads == 0 and head_dim in (None, _d_head(text)),
        "num_attention_heads",
        text.num_attention_heads,
        f"a divisor of hidden_size = {text.hidden_size}, and no head_dim of its own (got {head_dim})",
    )
    expect(not rope.get("mrope_interleaved"), "rope_scaling.mrope_interleaved", rope.get("mrope_interleaved"), "False")


def _expect_tower(hf: Any, width: str, writes: str, activation: str, expect: Callable) -> None:
    """Checks for every tower: its activation function, a d_head that 2-D rotary allows, and an output of width d_model."""
    vision, d_vision = hf.vision_config, getattr(hf.vision_config, width)
    expect(vision.hidden_act == activation, "vision_config.hidden_act", vision.hidden_act, repr(activation))
    expect(
        d_vision % (4 * vision.num_heads) == 0,
        "vision_config.num_heads",
        vision.num_heads,
        f"{width} = {d_vision} split into heads whose width is a multiple of 4 (2-D rotary)",
    )
    expect(
        getattr(vision, writes) == hf.text_config.hidden_size,
        f"vision_config.{writes}",
        getattr(vision, writes),
        f"the decoder's hidden_size = {hf.text_config.hidden_size}",
    )


def _unsupported_2(hf: Any) -> list[str]:
    problems = _Problems()
    _expect_heads_of_the_stream(hf.text_config, problems.expect)
    _expect_tower(hf, "embed_dim", "hidden_size", "quick_gelu", problems.expect)
    return problems


def _unsupported_25(hf: Any) -> list[str]:
    problems, vision = _Problems(), hf.vision_config
    expect = problems.expect
    _expect_heads_of_the_stream(hf.text_config, expect)
    _expect_tower(hf, "hidden_size", "out_hidden_size", "silu", expect)
    token = vision.patch_size * vision.spatial_merge_size
    expect(vision.window_size >= token, "vision_config.window_size", vision.window_size, f"at least an image token's {token} pixels")
    rate = vision.tokens_per_second
    expect(isinstance(rate, Real) and 0 < cast(Any, rate) < float("inf"), "vision_config.tokens_per_second", rate, "a number above 0")
    return problems


def _unsupported_3(hf: Any) -> list[str]:
    problems, text, vision = _Problems(), hf.text_config, hf.vision_config
    expect = problems.expect
    _expect_tower(hf, "hidden_size", "out_hidden_size", "gelu_pytorch_tanh", expect)
    interleaved = (text.rope_parameters or {}).get("mrope_interleaved", True)
    expect(interleaved is True, "rope_scaling.mrope_interleaved", interleaved, "True: transformers interleaves whatever it says")
    expect(not text.attention_bias, "attention_bias", text.attention_bias, "False")
    n_positions = vision.num_position_embeddings
    expect(round(n_positions**0.5) ** 2 == n_positions, "vision_config.num_position_embeddings", n_positions, "the square of a side")
    layers = list(vision.deepstack_visual_indexes)
    expect(
        layers == sorted(set(layers)) and all(0 <= layer < vision.depth for layer in layers),
        "vision_config.deepstack_visual_indexes",
        layers,
        f"blocks of the tower, in order, in 0..{vision.depth - 1}",
    )
    expect(
        len(layers) < text.num_hidden_layers,
        "vision_config.deepstack_visual_indexes",
        layers,
        f"fewer than the decoder's {text.num_hidden_layers} blocks: what is added after the last would miss resid_post",
    )
    return problems


def _d_head(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _vision_base(vision: Any) -> float:
    return (vision.rope_parameters or {}).get("rope_theta", 10_000.0)


def _text(hf: Any, **parts: Any) -> TextConfig:
    text, rope = hf.text_config, hf.text_config.rope_parameters
    return TextConfig(
        n_layers=text.num_hidden_layers,
        d_model=text.hidden_size,
        n_heads=text.num_attention_heads,
        n_key_value_heads=text.num_key_value_heads,
        d_head=_d_head(text),
        d_mlp=text.intermediate_size,
        d_vocab=text.vocab_size,
        n_ctx=text.max_position_embeddings,
        eps=text.rms_norm_eps,
        rotary_base=float(rope["rope_theta"]),
        mrope_section=tuple(rope.get("mrope_section", (16, 24, 24))),
        tie_word_embeddings=bool(hf.tie_word_embeddings),
        **parts,
    )


def _text_3(hf: Any) -> TextConfig:
    return _text(hf, mrope_interleaved=True, qkv_bias=False, qk_norm=True)


def _vision(hf: Any, d_vision: int, d_mlp: int, d_out: int, **parts: Any) -> VisionConfig:
    vision = hf.vision_config
    return VisionConfig(
        n_layers=vision.depth,
        d_vision=d_vision,
        n_heads=vision.num_heads,
        d_head=d_vision // vision.num_heads,
        d_mlp=d_mlp,
        d_out=d_out,
        in_channels=vision.in_channels,
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        spatial_merge_size=vision.spatial_merge_size,
        rotary_base=float(_vision_base(vision)),
        tower=hf.model_type,
        **parts,
    )


def _vision_2(hf: Any) -> VisionConfig:
    vision = hf.vision_config
    return _vision(hf, vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio), vision.hidden_size)


def _vision_25(hf: Any) -> VisionConfig:
    vision = hf.vision_config
    return _vision(
        hf,
        vision.hidden_size,
        vision.intermediate_size,
        vision.out_hidden_size,
        window=vision.window_size // vision.spatial_merge_size // vision.patch_size,
        full_attention_layers=tuple(vision.fullatt_block_indexes),
        layer_norm=False,
        tokens_per_second=vision.tokens_per_second,
    )


def _vision_3(hf: Any) -> VisionConfig:
    vision = hf.vision_config
    return _vision(
        hf,
        vision.hidden_size,
        vision.intermediate_size,
        vision.out_hidden_size,
        position_side=round(vision.num_position_embeddings**0.5),
        deepstack_layers=tuple(vision.deepstack_visual_indexes),
        timestamps=True,
    )


@dataclass(frozen=True)
class Family:
    """How to read the configurations of one model type.

    Attributes:
        architecture: name of HF's model class.
        config: HF's configuration class.
        text, vision: functions from HF's configuration to TextConfig and VisionConfig.
        unsupported: function from HF's configuration to one line for each unsupported value.
    """

    architecture: str
    config: type[PretrainedConfig]
    text: Callable[[Any], TextConfig]
    vision: Callable[[Any], VisionConfig]
    unsupported: Callable[[Any], list[str]]


FAMILIES = {
    "qwen2_vl": Family(ARCHITECTURE, Qwen2VLConfig, _text, _vision_2, _unsupported_2),
    "qwen2_5_vl": Family("Qwen2_5_VLForConditionalGeneration", Qwen2_5_VLConfig, _text, _vision_25, _unsupported_25),
    "qwen3_vl": Family("Qwen3VLForConditionalGeneration", Qwen3VLConfig, _text_3, _vision_3, _unsupported_3),
}
_REFUSED = {
    "qwen3_vl_moe": "Qwen3-VL-MoE has experts in place of the decoder's MLPs, which this port does not compute.",
    "qwen2_5_omni": "Qwen2.5-Omni hears and speaks: its audio half is not computed here.",
    "qwen3_omni_moe": "Qwen3-Omni hears and speaks, and has experts: neither is computed here.",
    "qwen3_5": "Qwen3.5 has linear-attention blocks, which this port does not compute.",
    "qwen3_5_moe": "Qwen3.5-MoE has linear-attention blocks and experts, which this port does not compute.",
}


def _special(hf: Any, generation: dict[str, Any]) -> SpecialTokens:
    eos = generation.get("eos_token_id", getattr(hf.text_config, "eos_token_id", None))
    return SpecialTokens(
        image=hf.image_token_id,
        video=hf.video_token_id,
        vision_start=hf.vision_start_token_id,
        vision_end=hf.vision_end_token_id,
        eos=() if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,),
        pad=generation.get("pad_token_id", hf.text_config.pad_token_id),
    )
