"""Qwen2-VL's vision tower and projector: from pixels to image embeddings.

All images of a batch run packed, `[1 patch …]`, in the tower's order, by merge block (2×2 patches): four consecutive patches are
one image token.

    pixels ─► patch embedding ─► blocks (2-D rotary, attention inside each image) ─► norm ─► merge 2×2 ─► MLP

The towers of its successors are in `vision_qwen25` and `vision_qwen3`. All towers take pixels and grids. All projectors return
[stream image_token d_model]; stream 0 has the image embeddings, and only Qwen3-VL has further streams.

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
from .layers import MLP, HookPoint, LayerNorm, RMSNorm, quick_gelu, readable
from .positions import attention_segments, patch_coordinates
from .rope import Rotation, vision_rotation


def vision_block(cfg: VisionConfig) -> Block:
    """One block of the tower, without its weights."""
    return Block(
        ln1=LayerNorm(cfg.d_vision, cfg.eps),
        attn=Attention(cfg.d_vision, cfg.n_heads, cfg.n_heads, cfg.d_head),
        ln2=LayerNorm(cfg.d_vision, cfg.eps),
        mlp=MLP(cfg.d_vision, cfg.d_mlp, quick_gelu),
    )


class VisionEncoder(nn.Module):
    """The vision transformer without the projector."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.cfg = cfg
        self.patch_embed = nn.Linear(cfg.d_patch, cfg.d_vision, bias=False)
        self.hook_patch_embed = HookPoint()  # [1, patch, d_vision]
        self.blocks = nn.ModuleList(vision_block(cfg) for _ in range(cfg.n_layers))

    def forward(self, pixels: Float[Tensor, "patch d_patch"], grid_thw: Int[Tensor, "image 3"]) -> Float[Tensor, "1 patch d_vision"]:
        """The tower's residual stream after its last block.

        Args:
            pixels: flattened patches (channel, frame, row, col), normalised, in the tower's order.
            grid_thw: patches along (t, h, w) of each image or video.
        """
        return self.run_blocks(self.hook_patch_embed(self.patch_embed(pixels)[None]), grid_thw)

    def run_blocks(
        self, resid: Float[Tensor, "1 patch d_vision"], grid_thw: Int[Tensor, "image 3"], start: int = 0
    ) -> Float[Tensor, "1 patch d_vision"]:
        """Runs the blocks from `start` on."""
        rotation, visible = patch_rotation(self.cfg, grid_thw, resid), whole_images(grid_thw, resid.device)
        for block in self.blocks[start:]:
            resid = block(resid, rotation, visible)
        return resid

    @property
    def W_E(self) -> Float[Tensor, "d_patch d_vision"]:
        return readable(self.patch_embed.weight, "the patch embedding").T


class Merger(nn.Module):
    """Base class of mergers: concatenates each 2×2 block of patches, then an MLP gives one image token of width d_model."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.cfg = cfg
        self.fc1 = nn.Linear(cfg.d_merge, cfg.d_merge)
        self.fc2 = nn.Linear(cfg.d_merge, cfg.d_out)
        self.hook_in = HookPoint()  # [1, patch, d_vision]
        self.hook_pre = HookPoint()  # [1, image_token, d_merge]
        self.hook_post = HookPoint()  # [1, image_token, d_merge]
        self.hook_out = HookPoint()  # [1, image_token, d_model]

    def write(self, merged: Float[Tensor, "1 image_token d_merge"]) -> Float[Tensor, "1 image_token d_model"]:
        """The MLP of merged patches."""
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


class VisionProjector(Merger):
    """The merger between tower and decoder: normalises every patch, then merges."""

    def __init__(self, cfg: VisionConfig):
        super().__init__(cfg)
        self.ln: LayerNorm | RMSNorm = LayerNorm(cfg.d_vision, cfg.eps)

    def forward(
        self, resid: Float[Tensor, "1 patch d_vision"], grid_thw: Int[Tensor, "image 3"] | None = None
    ) -> Float[Tensor, "1 image_token d_model"]:
        """The image embeddings. The grids are not needed, because this tower has its merge blocks in the order of the image tokens."""
        return self.write(self.ln(self.hook_in(resid)).reshape(1, -1, self.cfg.d_merge))

    @property
    def out_hooks(self) -> list[HookPoint]:
        """The output hook of each stream."""
        return [self.hook_out]


def patch_rotation(cfg: VisionConfig, grid_thw: Int[Tensor, "image 3"], resid: Float[Tensor, "1 patch d_vision"]) -> Rotation:
    """2-D rotation of each patch, by merge block, in float32 as in the reference (float64 for a float64 stream)."""
    coordinates = patch_coordinates(grid_thw, cfg.spatial_merge_size).to(resid.device)
    dtype = torch.float64 if resid.dtype == torch.float64 else torch.float32
    return vision_rotation(coordinates, cfg.rotary_base, cfg.d_head, dtype)


def whole_images(grid_thw: Int[Tensor, "image 3"], device: torch.device) -> Segments:
    """The mask in which every patch sees its image, or its frame of a video."""
    return Segments(tuple(int(n) for n in attention_segments(grid_thw)), device)
