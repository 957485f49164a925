"""Weight processing: changes the weights so that they are easier to interpret, but not the log-probabilities.

1. `fold_ln`: multiplies a norm's weight γ into the matrices after it, as W(γ ⊙ x) = (W γ) x.
2. `center_unembed`: subtracts the mean logit from all logits, which leaves log-probabilities unchanged.
3. `fold_value_biases`: attention patterns sum to 1, so b_V adds the constant Σ_h b_V W_O to the stream; it is added to b_O.

Each block is computed in float32 and stored in the model's dtype, so the extra memory is that of one block besides the new
weights. Changed weights are new tensors: the checkpoint, a transformers model that shares the storage, and a tied embedding do not
change. The folded weight of the final norm is kept as `ln_final.folded_w`, to compute HF's last hidden state.

Source: TransformerLens, `weight_processing.py` (the tests compare with it).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .layers import readable


@torch.no_grad()
def process_weights(
    model: Any, fold_ln: bool = True, center_unembed: bool = True, fold_value_biases: bool = True, verbose: bool = False
) -> None:
    """Processes the weights of a HookedQwen2VL in place (see the steps above).

    Raises:
        RuntimeError: a weight is offloaded.
    """
    for block in tqdm(model.blocks, disable=not verbose, desc="processing", unit="block"):
        if fold_ln:
            _fold(block.ln1, block.attn.q_proj, block.attn.k_proj, block.attn.v_proj)
            _fold(block.ln2, block.mlp.gate_proj, block.mlp.up_proj)
        if fold_value_biases:
            _fold_value_bias(block.attn)
    if fold_ln:
        folded = model.ln_final.w.detach() * getattr(model.ln_final, "folded_w", 1.0)
        _fold(model.ln_final, model.unembed)
        model.ln_final.register_buffer("folded_w", folded, persistent=False)
        model.cfg.normalization_type, model.cfg.layer_norm_folding = "RMSPre", True
    if center_unembed:
        weight = _wide(model.unembed.weight)
        _replace(model.unembed, "weight", weight - weight.mean(0, keepdim=True))


def _fold(norm: Any, *readers: Any) -> None:
    gain = _wide(norm.w)
    for reader in readers:
        _replace(reader, "weight", _wide(reader.weight) * gain)
    _replace(norm, "w", torch.ones_like(gain))


def _fold_value_bias(attn: Any) -> None:
    if attn.v_proj.bias is None:
        return
    b_V = _wide(attn.b_V).repeat_interleave(attn.n_heads // attn.n_key_value_heads, dim=0)  # [head d_head]
    written = torch.einsum("hd,hdm->m", b_V, _wide(attn.W_O))
    _replace(attn.o_proj, "bias", _wide(attn.o_proj.bias) + written)
    _replace(attn.v_proj, "bias", torch.zeros_like(attn.v_proj.bias))


def _wide(weight: Tensor) -> Tensor:
    return readable(weight, "a weight to process").to(torch.promote_types(weight.dtype, torch.float32))


def _replace(module: Any, name: str, value: Tensor) -> None:
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad))
