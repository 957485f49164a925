"""The text decoder's block: RMSNorm, grouped-query attention with M-RoPE, SwiGLU."""

from __future__ import annotations

from .attention import Attention
from .block import Block
from .config import TextConfig
from .layers import GatedMLP, RMSNorm


def decoder_block(cfg: TextConfig) -> Block:
    """One block of the decoder, with weights still to be loaded."""
    return Block(
        ln1=RMSNorm(cfg.d_model, cfg.eps),
        attn=Attention(cfg.d_model, cfg.n_heads, cfg.n_key_value_heads, cfg.d_head),
        ln2=RMSNorm(cfg.d_model, cfg.eps),
        mlp=GatedMLP(cfg.d_model, cfg.d_mlp),
    )
