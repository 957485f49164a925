"""The vision tower and the projector: pixels to the decoder's residual stream.

All images of a batch run packed, `[1 patch …]`, in the tower's order: 2×2 window by window, so that
four consecutive patches are one image token.

    pixels ─► patch embedding ─► blocks (2-D rotary, attention inside each image) ─► norm ─► merge 2×2 ─► MLP

Source: Qwen2-VL technical report, section 2.1; `modeling_qwen2_vl.py` of transformers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .attention import Attention, Segments
from .block import Block
from .config import VisionConfig
from .layers import MLP, HookPoint, LayerNorm, readable
from .positions import attention_segments, patch_coordinates
from .rope import vision_rotation


def vision_block(cfg: VisionConfig) -> Block:
    """One block of the tower, with weights still to be loaded."""
    return Block(
        ln1=LayerNorm(cfg.d_vision, cfg.eps),
        attn=Attention(cfg.d_vision, cfg.n_heads, cfg.n_heads, cfg.d_head),
        ln2=LayerNorm(cfg.d_vision, cfg.eps),
        mlp=MLP(cfg.d_vision, cfg.d_mlp),
    )


class VisionEncoder(nn.Module):
    """The vision transformer, up to its last residual stream."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.cfg = cfg
        self.patch_embed = nn.Linear(cfg.d_patch, cfg.d_vision, bias=False)
        self.hook_patch_embed = HookPoint()  # [1, patch, d_vision]
        self.blocks = nn.ModuleList(vision_block(cfg) for _ in range(cfg.n_layers))

    def forward(
        self, pixels: Float[Tensor, "patch d_patch"], grid_thw: Int[Tensor, "image 3"]
    ) -> Float[Tensor, "1 patch d_vision"]:
        """The tower's residual stream after its last block.

        Args:
            pixels: flattened patches (channel, frame, row, col), normalised, in the tower's order.
            grid_thw: patches along (t, h, w) of each image or video.
        """
        return self.run_blocks(self.hook_patch_embed(self.patch_embed(pixels)[None]), grid_thw)

    def run_blocks(
        self, resid: Float[Tensor, "1 patch d_vision"], grid_thw: Int[Tensor, "image 3"], start: int = 0
    ) -> Float[Tensor, "1 patch d_vision"]:
        """The blocks from `start` on."""
        coordinates = patch_coordinates(grid_thw, self.cfg.spatial_merge_size).to(resid.device)
        rotation = vision_rotation(coordinates, self.cfg.rotary_base, self.cfg.d_head, _rotary_dtype(resid.dtype))
        visible = Segments(tuple(int(n) for n in attention_segments(grid_thw)), resid.device)
        for block in self.blocks[start:]:
            resid = block(resid, rotation, visible)
        return resid

    @property
    def W_E(self) -> Float[Tensor, "d_patch d_vision"]:
        return readable(self.patch_embed.weight, "the patch embedding").T


class VisionProjector(nn.Module):
    """Merges each 2×2 window of patches into one image token of the decoder's width."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.cfg = cfg
        self.ln = LayerNorm(cfg.d_vision, cfg.eps)
        self.fc1 = nn.Linear(cfg.d_merge, cfg.d_merge)
        self.fc2 = nn.Linear(cfg.d_merge, cfg.d_out)
        self.hook_in = HookPoint()  # [1, patch, d_vision]
        self.hook_pre = HookPoint()  # [1, image_token, d_merge]
        self.hook_post = HookPoint()  # [1, image_token, d_merge]
        self.hook_out = HookPoint()  # [1, image_token, d_model]

    def forward(self, resid: Float[Tensor, "1 patch d_vision"]) -> Float[Tensor, "1 image_token d_model"]:
        merged = self.ln(self.hook_in(resid)).reshape(1, -1, self.cfg.d_merge)
        pre = self.hook_pre(self.fc1(merged))
        return self.hook_out(self.fc2(self.hook_post(F.gelu(pre))))

    @property
    def W_in(self) -> Float[Tensor, "d_merge d_merge"]:
        return readable(self.fc1.weight, "W_in").T

    @property
    def b_in(self) -> Float[Tensor, "d_merge"]:
        return readable(self.fc1.bias, "b_in")

    @property
    def W_out(self) -> Float[Tensor, "d_merge d_model"]:
        return readable(self.fc2.weight, "W_out").T

    @property
    def b_out(self) -> Float[Tensor, "d_model"]:
        return readable(self.fc2.bias, "b_out")


def _rotary_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
