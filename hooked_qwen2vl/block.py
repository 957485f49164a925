"""The transformer block of tower and decoder (norm, attention, add; norm, MLP, add), and the decoder's version of it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry

from .attention import Attention, Visibility
from .config import TextConfig
from .layers import MLP, GatedMLP, HookPoint, LayerNorm, RMSNorm, listened
from .rope import Rotation


class Block(nn.Module):
    """A pre-norm transformer block with TransformerLens's hook points.

    Hooks at the input of a branch (`hook_attn_in`, `hook_mlp_in`, `attn.hook_{q,k,v}_input`) get a copy of the residual stream,
    because TransformerLens's patch setters write in place, and the other branch must not change.
    """

    hook_out_is_single_residual_stream = True  # read by TransformerLens's logit lens

    def __init__(self, ln1: RMSNorm | LayerNorm, attn: Attention, ln2: RMSNorm | LayerNorm, mlp: GatedMLP | MLP):
        super().__init__()
        self.ln1, self.attn, self.ln2, self.mlp = ln1, attn, ln2, mlp
        self.hook_resid_pre = HookPoint()  # [batch, pos, d_model]
        self.hook_attn_in = HookPoint()  # [batch, pos, head, d_model], only when listened to
        self.hook_attn_out = HookPoint()  # [batch, pos, d_model]
        self.hook_resid_mid = HookPoint()  # [batch, pos, d_model]
        self.hook_mlp_in = HookPoint()  # [batch, pos, d_model]
        self.hook_mlp_out = HookPoint()  # [batch, pos, d_model]
        self.hook_resid_post = HookPoint()  # [batch, pos, d_model]

    def forward(
        self,
        resid_pre: Float[Tensor, "batch pos d_model"],
        rotation: Rotation,
        visible: Visibility,
        past: TransformerLensKeyValueCacheEntry | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        resid_pre = self.hook_resid_pre(resid_pre)
        attn_out = self.hook_attn_out(self.attn(*self._attention_inputs(resid_pre), rotation, visible, past))
        resid_mid = self.hook_resid_mid(resid_pre + attn_out)
        mlp_in = self.hook_mlp_in(resid_mid.clone()) if listened(self.hook_mlp_in) else resid_mid
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(mlp_in)))
        return self.hook_resid_post(resid_mid + mlp_out)

    def _attention_inputs(self, resid_pre: Float[Tensor, "batch pos d_model"]) -> tuple[Tensor, Tensor, Tensor]:
        """The normalised inputs of queries, keys and values: one for all heads, or one per head if a hook listens to those."""
        normalized = self.ln1(resid_pre)
        attn = self.attn
        split = (attn.hook_q_input, attn.hook_k_input, attn.hook_v_input)
        if not listened(self.hook_attn_in, *split):
            return normalized, normalized, normalized
        # ln1's hooks ran once, on the unsplit stream; their change is added to the input of every head.
        edit = normalized - self.ln1.without_hooks(resid_pre)
        heads = resid_pre.unsqueeze(-2).repeat(1, 1, attn.n_heads, 1)
        heads = self.hook_attn_in(heads)
        groups = heads[..., : attn.n_key_value_heads, :]  # as in TransformerLens: key-value head i uses copy i
        streams = (hook(stream.clone()) for hook, stream in zip(split, (heads, groups, groups)))
        return tuple(self.ln1.without_hooks(stream) + edit.unsqueeze(-2) for stream in streams)


def decoder_block(cfg: TextConfig) -> Block:
    """A block of the text decoder, without its weights: RMSNorm, grouped-query attention with M-RoPE, SwiGLU."""
    norm_eps = cfg.eps if cfg.qk_norm else None
    return Block(
        ln1=RMSNorm(cfg.d_model, cfg.eps),
        attn=Attention(cfg.d_model, cfg.n_heads, cfg.n_key_value_heads, cfg.d_head, cfg.qkv_bias, norm_eps),
        ln2=RMSNorm(cfg.d_model, cfg.eps),
        mlp=GatedMLP(cfg.d_model, cfg.d_mlp),
    )
