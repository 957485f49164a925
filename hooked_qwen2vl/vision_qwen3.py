"""Qwen3-VL's vision tower and projector: with learned position embeddings and DeepStack.

    pixels ─► patch embedding ─┐
    position embeddings, interpolated to the grid ─► + ─► blocks (2-D rotary, LayerNorm, attention inside each image)
                                                             │ after the last:   norm ─► merge 2×2 ─► MLP ─► stream 0
                                                             └ after a few:      merge 2×2 ─► norm ─► MLP ─► stream k + 1

Stream 0 has the image embeddings. DeepStack adds stream k + 1 to the decoder's residual stream at the positions of the image,
after decoder block k (see `HookedQwen2VL.run_blocks`).

Source: Qwen3-VL technical report; DeepStack (Meng et al., arXiv 2406.04334); `modeling_qwen3_vl.py` of transformers.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .attention import Attention
from .block import Block
from .config import VisionConfig
from .layers import MLP, HookPoint, LayerNorm, gelu_tanh, listened, readable
from .positions import interpolation
from .vision import Merger, patch_rotation, whole_images


def vision_block(cfg: VisionConfig) -> Block:
    """One block of the tower, without its weights."""
    return Block(
        ln1=LayerNorm(cfg.d_vision, cfg.eps),
        attn=Attention(cfg.d_vision, cfg.n_heads, cfg.n_heads, cfg.d_head),
        ln2=LayerNorm(cfg.d_vision, cfg.eps),
        mlp=MLP(cfg.d_vision, cfg.d_mlp, gelu_tanh),
    )


class VisionEncoder(nn.Module):
    """The vision transformer without the projector."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.cfg = cfg
        self.patch_embed = nn.Linear(cfg.d_patch, cfg.d_vision)
        self.pos_embed = nn.Embedding(cfg.position_side**2, cfg.d_vision)
        self.hook_patch_embed = HookPoint()  # [1, patch, d_vision]
        self.hook_pos_embed = HookPoint()  # [1, patch, d_vision]
        self.blocks: Any = nn.ModuleList(vision_block(cfg) for _ in range(cfg.n_layers))

    def forward(self, pixels: Float[Tensor, "patch d_patch"], grid_thw: Int[Tensor, "image 3"]) -> Float[Tensor, "stream patch d_vision"]:
        """The tower's residual stream after its last block, then after each block of `deepstack_layers`.

        Args:
            pixels: flattened patches (channel, frame, row, col), normalised, in the tower's order.
            grid_thw: patches along (t, h, w) of each image or video.
        """
        patches = self.hook_patch_embed(self.patch_embed(pixels)[None])
        positions = self.hook_pos_embed(self.positions(grid_thw, patches.device).to(patches.dtype)[None])
        return self.run_blocks(patches + positions, grid_thw)

    def positions(self, grid_thw: Int[Tensor, "image 3"], device: torch.device) -> Float[Tensor, "patch d_vision"]:
        """The position embeddings, bilinearly interpolated to each grid; float32 or wider."""
        places, weights = interpolation(grid_thw, self.cfg.spatial_merge_size, cast(int, self.cfg.position_side))
        return (self.pos_embed(places.to(device)) * weights[..., None].to(device)).sum(1)

    def run_blocks(
        self,
        resid: Float[Tensor, "1 patch d_vision"],
        grid_thw: Int[Tensor, "image 3"],
        start: int = 0,
        *tapped: Float[Tensor, "1 patch d_vision"],
    ) -> Float[Tensor, "stream patch d_vision"]:
        """Runs the blocks from `start` on.

        Args:
            tapped: the residual streams after those blocks of `deepstack_layers` that are before `start`.
        """
        rotation, visible = patch_rotation(self.cfg, grid_thw, resid), whole_images(grid_thw, resid.device)
        streams = list(tapped)
        for layer in range(start, self.cfg.n_layers):
            resid = self.blocks[layer](resid, rotation, visible)
            if layer in self.cfg.deepstack_layers:
                streams.append(resid)
                following = self.blocks[layer + 1 : layer + 2]
                if any(listened(block.hook_resid_pre) for block in following):
                    resid = resid.clone()  # a hook that writes in place there must not reach the merger
        return torch.cat([resid, *streams])

    @property
    def W_E(self) -> Float[Tensor, "d_patch d_vision"]:
        return readable(self.patch_embed.weight, "the patch embedding").T

    @property
    def W_pos(self) -> Float[Tensor, "position d_vision"]:
        return readable(self.pos_embed.weight, "the table of positions")


class DeepStackMerger(Merger):
    """The merger of a DeepStack stream: merges, then normalises."""

    def __init__(self, cfg: VisionConfig):
        super().__init__(cfg)
        self.ln = LayerNorm(cfg.d_merge, cfg.eps)

    def forward(self, resid: Float[Tensor, "1 patch d_vision"]) -> Float[Tensor, "1 image_token d_model"]:
        return self.write(self.ln(self.hook_in(resid).reshape(1, -1, self.cfg.d_merge)))


class VisionProjector(Merger):
    """The mergers between tower and decoder: for the last residual stream, and for each DeepStack stream."""

    def __init__(self, cfg: VisionConfig):
        super().__init__(cfg)
        self.ln = LayerNorm(cfg.d_vision, cfg.eps)
        self.deepstack: Any = nn.ModuleList(DeepStackMerger(cfg) for _ in cfg.deepstack_layers)

    def forward(
        self, streams: Float[Tensor, "stream patch d_vision"], grid_thw: Int[Tensor, "image 3"] | None = None
    ) -> Float[Tensor, "stream image_token d_model"]:
        """The image embeddings, then what DeepStack adds. The grids are not needed: merge blocks are in the order of image tokens."""
        last, *tapped = streams.split(1)
        written = self.write(self.ln(self.hook_in(last)).reshape(1, -1, self.cfg.d_merge))
        return torch.cat([written, *(merger(stream) for merger, stream in zip(self.deepstack, tapped))])

    @property
    def out_hooks(self) -> list[HookPoint]:
        """The output hook of each stream."""
        return [self.hook_out, *(merger.hook_out for merger in self.deepstack)]
