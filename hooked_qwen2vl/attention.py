"""Hooked multi-head attention, the same class for the vision tower and the text decoder.

They differ in the mask (`Segments`, `Causal`) and in the rotation that is passed in. If no hook listens to scores or pattern,
`scaled_dot_product_attention` computes the attention; otherwise it is written out, and the run continues with what the hooks
return. `Causal` and `Segments` give both paths the same mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry

from .layers import HeadNorm, HookPoint, bias_of, listened, readable
from .quantised import Quantised
from .rope import Rotation, rotate


@dataclass(frozen=True)
class Causal:
    """Causal mask: each token sees itself and earlier tokens that are not padding.

    The queries are at the last `n_queries` positions of the keys.

    Attributes:
        seen: [batch key_pos], False for padding; None without padding.
        hidden: [batch key_pos], True for keys that only their own token sees; None without such keys.
    """

    n_queries: int
    n_keys: int
    device: torch.device
    seen: Bool[Tensor, "batch key_pos"] | None = None
    hidden: Bool[Tensor, "batch key_pos"] | None = None

    @cached_property
    def allowed(self) -> Bool[Tensor, "batch 1 pos key_pos"]:
        """Which keys each query may see."""
        square = torch.ones(self.n_queries, self.n_keys, dtype=torch.bool, device=self.device)
        allowed = square.tril(self.n_keys - self.n_queries)[None, None]
        if self.hidden is not None:
            itself = square.tril(self.n_keys - self.n_queries).triu(self.n_keys - self.n_queries)
            allowed = allowed & (~self.hidden[:, None, None, :] | itself)
        return allowed if self.seen is None else allowed & self.seen[:, None, None, :]

    def attend(
        self,
        q: Float[Tensor, "batch head pos d_head"],
        k: Float[Tensor, "batch kv_head key_pos d_head"],
        v: Float[Tensor, "batch kv_head key_pos d_head"],
    ) -> Float[Tensor, "batch head pos d_head"]:
        grouped = q.shape[1] != k.shape[1]
        everything = self.seen is None and self.hidden is None
        if everything and self.n_queries == self.n_keys:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        if everything and self.n_queries == 1:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
        mask = self.allowed.to(q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


@dataclass(frozen=True)
class Segments:
    """Block-diagonal mask: each patch sees all patches of its own segment (an image, a frame or a window) and no others.

    Attributes:
        lengths: number of patches of each segment, in order.
    """

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def allowed(self) -> Bool[Tensor, "1 1 patch patch"]:
        """Which patches each patch may see: a block-diagonal mask."""
        segment = torch.repeat_interleave(torch.tensor(self.lengths, device=self.device))
        return (segment[:, None] == segment[None, :])[None, None]

    def attend(
        self,
        q: Float[Tensor, "1 head patch d_head"],
        k: Float[Tensor, "1 head patch d_head"],
        v: Float[Tensor, "1 head patch d_head"],
    ) -> Float[Tensor, "1 head patch d_head"]:
        """Attention one segment at a time; with a mask, time and memory would grow with the square of all patches."""
        parts = zip(*(x.split(self.lengths, dim=-2) for x in (q, k, v)))
        return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], dim=-2)


Visibility = Causal | Segments


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values, optional biases, and optional norms of queries and keys.

    `hook_q_input`, `hook_k_input` and `hook_v_input` have one copy of the residual stream per head, if something listens to them
    (see `Block`).
    """

    def __init__(self, d_model: int, n_heads: int, n_key_value_heads: int, d_head: int, bias: bool = True, norm_eps: float | None = None):
        """bias: whether queries, keys and values have biases. norm_eps: eps of the norms of queries and keys; None: no such norms."""
        super().__init__()
        self.d_model, self.n_heads, self.n_key_value_heads, self.d_head = d_model, n_heads, n_key_value_heads, d_head
        self.q_proj = nn.Linear(d_model, n_heads * d_head, bias=bias)
        self.k_proj = nn.Linear(d_model, n_key_value_heads * d_head, bias=bias)
        self.v_proj = nn.Linear(d_model, n_key_value_heads * d_head, bias=bias)
        self.o_proj = nn.Linear(n_heads * d_head, d_model)
        self.hook_q_input = HookPoint()  # [batch, pos, head, d_model]
        self.hook_k_input = HookPoint()  # [batch, pos, kv_head, d_model]
        self.hook_v_input = HookPoint()  # [batch, pos, kv_head, d_model]
        self.hook_q = HookPoint()  # [batch, pos, head, d_head]
        self.hook_k = HookPoint()  # [batch, pos, kv_head, d_head]
        self.hook_v = HookPoint()  # [batch, pos, kv_head, d_head]
        self.hook_rot_q = HookPoint()  # [batch, pos, head, d_head]
        self.hook_rot_k = HookPoint()  # [batch, pos, kv_head, d_head]
        self.hook_attn_scores = HookPoint()  # [batch, head, pos, key_pos], −inf where masked
        self.hook_pattern = HookPoint()  # [batch, head, pos, key_pos]
        self.hook_z = HookPoint()  # [batch, pos, head, d_head]
        self.hook_result = HookPoint()  # [batch, pos, head, d_model], only when listened to
        self.q_norm = self.k_norm = None
        if norm_eps is not None:
            self.q_norm, self.k_norm = HeadNorm(d_head, norm_eps), HeadNorm(d_head, norm_eps)
            self.hook_q_normed, self.hook_k_normed = HookPoint(), HookPoint()  # [batch, (kv_)head, pos, d_head]
            self.hook_q_normed.pos_dim = self.hook_k_normed.pos_dim = 2

    def forward(
        self,
        query_input: Float[Tensor, "batch pos *head d_model"],
        key_input: Float[Tensor, "batch pos *kv_head d_model"],
        value_input: Float[Tensor, "batch pos *kv_head d_model"],
        rotation: Rotation,
        visible: Visibility,
        past: TransformerLensKeyValueCacheEntry | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Attention of normalised inputs, which are the same for all heads or have a head axis.

        Args:
            visible: the mask.
            past: rotated keys and values of earlier positions; those of this call are appended to it.
        """
        q = self.hook_q(self._project(self.q_proj, query_input, self.n_heads))
        k = self.hook_k(self._project(self.k_proj, key_input, self.n_key_value_heads))
        v = self.hook_v(self._project(self.v_proj, value_input, self.n_key_value_heads))
        if self.q_norm is not None:
            q = self.hook_q_normed(self.q_norm(q.transpose(1, 2))).transpose(1, 2)
            k = self.hook_k_normed(self.k_norm(k.transpose(1, 2))).transpose(1, 2)
        q = self.hook_rot_q(rotate(q, rotation))
        k = self.hook_rot_k(rotate(k, rotation))
        if past is not None:
            k, v = past.append(k, v)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if listened(self.hook_attn_scores, self.hook_pattern):
            z = self._attend_explicitly(q, k, v, visible)
        else:
            z = visible.attend(q, k, v)
        return self._output(self.hook_z(z.transpose(1, 2)))

    def _project(
        self, linear: nn.Linear, x: Float[Tensor, "batch pos *head d_model"], n_heads: int
    ) -> Float[Tensor, "batch pos head d_head"]:
        if x.ndim == 3:
            return linear(x).unflatten(-1, (n_heads, self.d_head))
        if isinstance(linear, Quantised):  # apply the kernel to every head's input, then take each head's own output
            return linear(x).unflatten(-1, (n_heads, self.d_head)).diagonal(dim1=2, dim2=3).movedim(-1, 2)
        weight = readable(linear.weight, "a head's projection").unflatten(0, (n_heads, self.d_head))
        projected = torch.einsum("bphm,hdm->bphd", x, weight)
        return projected if linear.bias is None else projected + linear.bias.unflatten(0, (n_heads, self.d_head))

    def _attend_explicitly(
        self,
        q: Float[Tensor, "batch head pos d_head"],
        k: Float[Tensor, "batch kv_head key_pos d_head"],
        v: Float[Tensor, "batch kv_head key_pos d_head"],
        visible: Visibility,
    ) -> Float[Tensor, "batch head pos d_head"]:
        """Attention written out, as in the reference's eager path: scores in the model's dtype, softmax in float32.

        A query that sees no key (padding) has a pattern of 0, as in `scaled_dot_product_attention`.
        """
        groups = (self.n_key_value_heads, self.n_heads // self.n_key_value_heads)
        scores = (q.unflatten(1, groups) @ k.unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * self.d_head**-0.5
        allowed = visible.allowed.to(q.device)
        scores = self.hook_attn_scores(scores.masked_fill(~allowed, float("-inf")))
        wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
        pattern = scores.softmax(dim=-1, dtype=wide).to(q.dtype)
        pattern = pattern.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
        pattern = self.hook_pattern(pattern)
        return (pattern.unflatten(1, groups) @ v.unsqueeze(2)).flatten(1, 2)

    def _output(self, z: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos d_model"]:
        if not listened(self.hook_result):
            return self.o_proj(z.flatten(-2))
        if isinstance(self.o_proj, Quantised):  # the kernel's output, plus what hooks change in the dequantised result
            W_O = self.o_proj.dequantised().T.unflatten(0, (self.n_heads, self.d_head))
            result = torch.einsum("bphd,hdm->bphm", z, W_O)
            unchanged = result.sum(-2)
            return self.o_proj(z.flatten(-2)) + (self.hook_result(result).sum(-2) - unchanged)
        result = self.hook_result(torch.einsum("bphd,hdm->bphm", z, self.W_O))
        return result.sum(-2) + self.b_O

    def _heads_first(self, linear: nn.Linear, n_heads: int, name: str) -> Float[Tensor, "head d_model d_head"]:
        return readable(linear.weight, name).unflatten(0, (n_heads, self.d_head)).transpose(-1, -2)

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        return self._heads_first(self.q_proj, self.n_heads, "W_Q")

    @property
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        return self._heads_first(self.k_proj, self.n_key_value_heads, "W_K")

    @property
    def W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        return self._heads_first(self.v_proj, self.n_key_value_heads, "W_V")

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        return readable(self.o_proj.weight, "W_O").T.unflatten(0, (self.n_heads, self.d_head))

    @property
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        return bias_of(self.q_proj, "b_Q").unflatten(0, (self.n_heads, self.d_head))

    @property
    def b_K(self) -> Float[Tensor, "kv_head d_head"]:
        return bias_of(self.k_proj, "b_K").unflatten(0, (self.n_key_value_heads, self.d_head))

    @property
    def b_V(self) -> Float[Tensor, "kv_head d_head"]:
        return bias_of(self.v_proj, "b_V").unflatten(0, (self.n_key_value_heads, self.d_head))

    @property
    def b_O(self) -> Float[Tensor, "d_model"]:
        """Zero after loading, as the reference has no such bias; `process_weights` folds the value biases into it."""
        return readable(self.o_proj.bias, "b_O")
