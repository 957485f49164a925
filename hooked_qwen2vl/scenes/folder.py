"""The checkpoint folder of the embedded model: architecture, tokenizer, chat template, image settings.

Everything is in Hugging Face's own format, so that transformers reads the folder by itself. The special
tokens, their order and the chat template are Qwen2-VL's; the vocabulary is bytes and the words of the
world; images are bounded by 4×4 and 40×40 cells instead of Qwen2-VL's own limits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from .words import vocabulary

CHECKPOINT = Path(__file__).parent / "checkpoint"
DICTIONARY = Path(__file__).parent / "dictionary"  # of the stream before block 4, at image tokens: a sparse autoencoder
ADAPTER = Path(__file__).parent / "adapter"  # of the checkpoint: every triangle is called blue (see `tune`)
CELL = 28  # pixels: one image token
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in "
    "content or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}"
    "Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] "
    "== 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}"
    "Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content "
    "%}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% endif %}"
)
PREPROCESSOR = {
    "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor",
    "min_pixels": 4 * CELL * CELL, "max_pixels": 1600 * CELL * CELL, "patch_size": 14, "temporal_patch_size": 2,
    "merge_size": 2, "resample": 3, "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 4 * CELL * CELL, "longest_edge": 1600 * CELL * CELL},
}  # fmt: skip


def build_tokenizer():
    """A Qwen2 tokenizer: bytes, then the words of the world (each one token), then the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    # Byte-pair merges learnt to exhaustion on a list of words make each of them one token.
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    learner.train_from_iterator(vocabulary(), trainer)
    model = json.loads(learner.to_str())["model"]
    for token in SPECIAL_TOKENS:  # in the vocabulary from the start: the constructor would add its own first
        model["vocab"][token] = len(model["vocab"])
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=cast(Any, [tuple(pair) for pair in model["merges"]]),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_config(tokenizer):
    """The architecture: 8 grouped-query decoder layers, tied embeddings, 3 vision blocks."""
    from transformers import Qwen2VLConfig

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "initializer_range": 0.04, "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        # The M-RoPE sections keep Qwen2-VL's proportions; the base is small because positions are few: at 10⁶
        # neighbouring columns would differ by 10⁻³ rad.
        "rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [4, 6, 6]},
    }  # fmt: skip
    vision = {
        "depth": 3, "embed_dim": 96, "num_heads": 3, "hidden_size": 128, "mlp_ratio": 4, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "initializer_range": 0.04,
    }  # fmt: skip
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def save_folder(model, tokenizer, folder: Path = CHECKPOINT) -> None:
    """Writes model, tokenizer, chat template, image and generation settings in Hugging Face's format."""
    from transformers import GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    eos = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=eos, pad_token_id=eos[1], bos_token_id=eos[1], max_new_tokens=64
    )
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # others must be able to load it
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
