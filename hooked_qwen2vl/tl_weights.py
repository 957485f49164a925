"""Weights under TransformerLens's names and in its shapes, stacked over layers.

The weights of a block (`model.blocks[l].attn.W_Q`) are views of the checkpoint's storage; the stacked ones here are copies, as in
TransformerLens. Keys and values have `n_key_value_heads`; only `QK`, `OV` and the composition scores repeat them for each head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import FactoredMatrix
from transformer_lens.utilities import composition_scores

from .layers import HookPoint, no_bias, readable
from .mixin import Mixin
from .overflow import finite

if TYPE_CHECKING:
    from transformer_lens.model_bridge.composition_scores import CompositionScores

_BLOCK_WEIGHTS = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
_MLP_WEIGHTS = ("W_in", "W_gate", "W_out", "b_in", "b_out")


class TransformerLensWeights(Mixin):
    """Mixin of HookedQwen2VL; uses `self.blocks`, `self.embed`, `self.unembed`, `self.ln_final`, `self.cfg`."""

    def _stack(self, part: str, name: str) -> Tensor:
        return torch.stack([getattr(getattr(block, part), name).to(self.cfg.device) for block in self.blocks])

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return readable(self.embed.weight, "W_E")

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.unembed.W_U

    @property
    def b_U(self) -> Float[Tensor, "d_vocab"]:
        return self.unembed.b_U

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        return self._stack("attn", "W_Q")

    @property
    def W_K(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        return self._stack("attn", "W_K")

    @property
    def W_V(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        return self._stack("attn", "W_V")

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        return self._stack("attn", "W_O")

    @property
    def b_Q(self) -> Float[Tensor, "layer head d_head"]:
        return self._stack("attn", "b_Q")

    @property
    def b_K(self) -> Float[Tensor, "layer kv_head d_head"]:
        return self._stack("attn", "b_K")

    @property
    def b_V(self) -> Float[Tensor, "layer kv_head d_head"]:
        return self._stack("attn", "b_V")

    @property
    def b_O(self) -> Float[Tensor, "layer d_model"]:
        return self._stack("attn", "b_O")

    @property
    def W_in(self) -> Float[Tensor, "layer d_model d_mlp"]:
        return self._stack("mlp", "W_in")

    @property
    def W_gate(self) -> Float[Tensor, "layer d_model d_mlp"]:
        return self._stack("mlp", "W_gate")

    @property
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:
        return self._stack("mlp", "W_out")

    @property
    def b_in(self) -> Float[Tensor, "layer d_mlp"]:
        return self._stack("mlp", "b_in")

    @property
    def b_out(self) -> Float[Tensor, "layer d_model"]:
        return self._stack("mlp", "b_out")

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q W_K^T of each head, [layer head d_model d_model].

        Raises:
            ValueError: queries and keys are normalised (Qwen3-VL), so that no matrix gives the attention scores.
        """
        if self.cfg.text.qk_norm:
            raise ValueError(
                f"{self.cfg.model_name} normalises every query and key (attn.q_norm, attn.k_norm), so that W_Q W_K^T does not give "
                f"its attention scores: read blocks.l.attn.hook_attn_scores, or W_Q and W_K by themselves."
            )
        return FactoredMatrix(self.W_Q, self._for_each_head(self.W_K).transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """W_V W_O of each head, [layer head d_model d_model]."""
        return FactoredMatrix(self._for_each_head(self.W_V), self.W_O)

    def _for_each_head(self, W: Float[Tensor, "layer kv_head ..."]) -> Float[Tensor, "layer head ..."]:
        return W.repeat_interleave(self.cfg.n_heads // int(self.cfg.n_key_value_heads or self.cfg.n_heads), dim=1)

    def accumulated_bias(self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True) -> Float[Tensor, "d_model"]:
        """Sum of the biases that are added to the residual stream before block `layer` (with `mlp_input`, before its MLP).

        The decoder's MLPs have no output bias, so `include_mlp_biases` has no effect.

        Raises:
            ValueError: mlp_input for a layer after the last block.
        """
        blocks = list(self.blocks)[: layer + 1 if mlp_input else layer]
        if mlp_input and layer >= self.cfg.n_layers:
            raise ValueError(f"mlp_input needs a block: layer {layer} is past the last of {self.cfg.n_layers}.")
        zero = torch.zeros(self.cfg.d_model, dtype=self.cfg.dtype, device=self.cfg.device)
        return sum((block.attn.b_O.to(self.cfg.device) for block in blocks), zero)

    def tokens_to_residual_directions(self, tokens: str | int | Int[Tensor, ""] | Int[Tensor, "..."]) -> Float[Tensor, "... d_model"]:
        """The column of W_U of each token: its dot product with the output of the final norm is the token's logit.

        The final norm's output includes its weight γ, if that is not folded; `cache.apply_ln_to_stack` and `cache.logit_attrs` apply it.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        ids = torch.as_tensor(tokens, device=self.cfg.device)
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"expected token ids or a single-token string, got a tensor of {ids.dtype}.")
        directions = self.W_U.T[ids.to(self.W_U.device)]
        return directions[0] if ids.numel() == 1 and ids.ndim == 1 else directions

    def all_composition_scores(self, mode: Literal["Q", "K", "V"]) -> CompositionScores:
        """Composition scores of each head's output with the queries, keys or values of each later head.

        Returns:
            [layer head layer head], 0 unless the first layer is earlier than the second.
        Raises:
            ValueError: an unknown mode, or Q or K for a model whose queries and keys are normalised (see `QK`).
        Source: A Mathematical Framework for Transformer Circuits (Elhage et al., 2021).
        """
        if mode not in ("Q", "K", "V"):
            raise ValueError(f"mode must be 'Q', 'K' or 'V', got {mode!r}.")
        right = {"Q": lambda: self.QK, "K": lambda: self.QK.T, "V": lambda: self.OV}[mode]()
        from transformer_lens.model_bridge.composition_scores import CompositionScores

        scores = composition_scores(self.OV, right, broadcast_dims=True)
        layers = torch.arange(self.cfg.n_layers, device=scores.device)
        earlier = layers[:, None, None, None] < layers[None, None, :, None]
        labels = self.all_head_labels
        return CompositionScores(scores * earlier, list(range(self.cfg.n_layers)), labels)

    @property
    def all_head_labels(self) -> HeadLabels:
        """["L0H0", "L0H1", …], as a list that can also be called."""
        return HeadLabels(f"L{layer}H{head}" for layer in range(self.cfg.n_layers) for head in range(self.cfg.n_heads))

    attn_head_labels = all_head_labels  # every block has attention

    # Properties, because TransformerLens checks statically whether a model has these names, which does not find submodules.

    @property
    def blocks(self) -> Any:
        """The decoder's blocks."""
        return self._modules["blocks"]

    @property
    def ln_final(self) -> Any:
        """The norm before the unembedding."""
        return self._modules["ln_final"]

    def blocks_with(self, submodule: str) -> list[tuple[int, nn.Module]]:
        """(layer, block) of every decoder block that has the submodule."""
        return [(layer, block) for layer, block in enumerate(self.blocks) if submodule in block._modules]

    def layer_types(self) -> list[str]:
        """The type of each decoder block, in TransformerLens's terms."""
        return ["attn+mlp"] * self.cfg.n_layers

    def tl_named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(TransformerLens name, weight) of all weights of the text side.

        As in TransformerLens, keys and values are repeated for each head (copies), because tools index them by head. The other
        weights are views of the model's storage.
        """
        groups = self.cfg.n_heads // int(self.cfg.n_key_value_heads or self.cfg.n_heads)
        yield "embed.W_E", self.W_E
        for layer, block in enumerate(self.blocks):
            yield f"blocks.{layer}.ln1.w", block.ln1.w
            for name in _BLOCK_WEIGHTS:
                weight = getattr(block.attn, name)
                shared = groups > 1 and name[-1] in "KV"
                yield f"blocks.{layer}.attn.{name}", weight.repeat_interleave(groups, dim=0) if shared else weight
            yield f"blocks.{layer}.ln2.w", block.ln2.w
            yield from ((f"blocks.{layer}.mlp.{name}", getattr(block.mlp, name)) for name in _MLP_WEIGHTS)
        yield "ln_final.w", self.ln_final.w
        yield "unembed.W_U", self.W_U
        yield "unembed.b_U", self.b_U

    def tl_parameters(self) -> dict[str, Tensor]:
        """`tl_named_parameters` as a dict, as SVDInterpreter needs it."""
        return dict(self.tl_named_parameters())


class HeadLabels(list):
    """A list of labels of heads that can also be called, because `all_head_labels` is a method in some versions of TransformerLens."""

    def __call__(self) -> list[str]:
        return list(self)


class Embed(nn.Embedding):
    """Token ids to token embeddings."""

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return readable(self.weight, "W_E")


class Unembed(nn.Module):
    """Normalised residual stream to logits; shares the embedding's weight if the checkpoint ties them.

    Raises:
        ValueError: when run: the logits or their input are not finite.
    """

    def __init__(self, d_model: int, d_vocab: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_vocab, d_model))
        self.hook_out = HookPoint()  # [batch, pos, d_vocab], the logits

    def forward(self, normalized: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_vocab"]:
        return self.hook_out(finite(nn.functional.linear(finite(normalized, "ln_final"), self.weight), "unembed"))

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return readable(self.weight, "W_U").T

    @property
    def b_U(self) -> Float[Tensor, "d_vocab"]:
        return no_bias(self.weight, self.weight.shape[0])
