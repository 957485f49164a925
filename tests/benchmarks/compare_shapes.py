"""Two untrained text models beside which docs/compare.md sets the embedded one: what no training looks like.

python tests/benchmarks/compare_shapes.py DIR      # writes DIR/gpt2 and DIR/qwen2, with the embedded model's tokenizer
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from hooked_qwen2vl.scenes import CHECKPOINT


def main(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    n = len(tokenizer)
    torch.manual_seed(0)
    models = {
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=n, n_positions=512, n_embd=96, n_layer=6, n_head=6)),
        "qwen2": Qwen2ForCausalLM(
            Qwen2Config(vocab_size=n, hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=6,
                        num_key_value_heads=2, max_position_embeddings=512)
        ),
    }  # fmt: skip
    for name, model in models.items():
        model.save_pretrained(Path(folder) / name)
        tokenizer.save_pretrained(Path(folder) / name)


if __name__ == "__main__":
    main(sys.argv[1])
