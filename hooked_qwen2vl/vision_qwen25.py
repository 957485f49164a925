"""Qwen2.5-VL's vision tower and projector: as Qwen2-VL's, with attention windows.

    pixels ─► sorted by window ─► patch embedding ─► blocks (2-D rotary, RMSNorm, gated MLP; attention inside each window,
    in a few blocks inside each image) ─► norm ─► merge 2×2 ─► raster order ─► MLP

Patches are sorted by window once, before the embedding, so that all hooks of the tower have the same order: windows of an image in
raster order, merge blocks of a window in raster order, 2×2 patches of a block. After the merge, image tokens are in raster order.
`Inputs.unpack_image` handles both orders.

Source: Qwen2.5-VL technical report, section 2.1; `modeling_qwen2_5_vl.py` of transformers.
"""

from __future__ import annotations

from typing import cast

from jaxtyping import Float, Int
from torch import Tensor, nn

from .attention import Attention, Segments
from .block import Block
from .config import VisionConfig
from .layers import GatedMLP, HookPoint, RMSNorm, readable
from .positions import patches_of, window_order
from .rope import Rotation
from .vision import Merger, patch_rotation, whole_images


def vision_block(cfg: VisionConfig) -> Block:
    """One block of the tower, without its weights."""
    return Block(
        ln1=RMSNorm(cfg.d_vision, cfg.eps),
        attn=Attention(cfg.d_vision, cfg.n_heads, cfg.n_heads, cfg.d_head),
        ln2=RMSNorm(cfg.d_vision, cfg.eps),
        mlp=GatedMLP(cfg.d_vision, cfg.d_mlp, bias=True),
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
        """The tower's residual stream after its last block, ordered by window.

        Args:
            pixels: flattened patches (channel, frame, row, col), normalised, ordered by merge block.
            grid_thw: patches along (t, h, w) of each image or video.
        """
        order, _ = window_order(grid_thw, self.cfg.spatial_merge_size, cast(int, self.cfg.window))
        pixels = pixels[patches_of(order, self.cfg.spatial_merge_size).to(pixels.device)]
        return self.run_blocks(self.hook_patch_embed(self.patch_embed(pixels)[None]), grid_thw)

    def run_blocks(
        self, resid: Float[Tensor, "1 patch d_vision"], grid_thw: Int[Tensor, "image 3"], start: int = 0
    ) -> Float[Tensor, "1 patch d_vision"]:
        """Runs the blocks from `start` on."""
        merge = self.cfg.spatial_merge_size
        order, lengths = window_order(grid_thw, merge, cast(int, self.cfg.window))
        patches = patches_of(order, merge).to(resid.device)
        rotation = Rotation(*(part[patches] for part in patch_rotation(self.cfg, grid_thw, resid)))
        windows = Segments(tuple((lengths * merge**2).tolist()), resid.device)
        images = whole_images(grid_thw, resid.device)
        for layer in range(start, self.cfg.n_layers):
            visible = images if layer in self.cfg.full_attention_layers else windows
            resid = self.blocks[layer](resid, rotation, visible)
        return resid

    @property
    def W_E(self) -> Float[Tensor, "d_patch d_vision"]:
        return readable(self.patch_embed.weight, "the patch embedding").T


class VisionProjector(Merger):
    """The merger between tower and decoder: normalises every patch, merges, and sorts image tokens in raster order."""

    def __init__(self, cfg: VisionConfig):
        super().__init__(cfg)
        self.ln = RMSNorm(cfg.d_vision, cfg.eps)

    def forward(self, resid: Float[Tensor, "1 patch d_vision"], grid_thw: Int[Tensor, "image 3"]) -> Float[Tensor, "1 image_token d_model"]:
        order, _ = window_order(grid_thw, self.cfg.spatial_merge_size, cast(int, self.cfg.window))
        merged = self.ln(self.hook_in(resid)).reshape(1, -1, self.cfg.d_merge)
        return self.write(merged[:, order.argsort().to(merged.device)])

    @property
    def out_hooks(self) -> list[HookPoint]:
        """The output hook of each stream."""
        return [self.hook_out]
