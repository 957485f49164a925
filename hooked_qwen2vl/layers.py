"""Hooked norms and MLPs of the vision tower and the text decoder.

Every activation passes through a `HookPoint`, and the run continues with what its hooks return. Weights keep the checkpoint's
layout (`[out in]`); `W_in`, `W_out`, … are views of them in TransformerLens's shapes. In the tower, `batch` is 1.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import hook_points

# The layout of the prompts that are running (`geometry.PromptShape`), and the attribute of cached activations with theirs.
running_prompt: ContextVar[Any] = ContextVar("running_prompt", default=None)
PROMPT = "hooked_qwen2vl_prompt"


class HookPoint(hook_points.HookPoint):
    """TransformerLens's hook point, skipped if it has no hooks, to save the call of a module."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) if listened(self) else x

    def add_hook(self, hook: Callable, *args: Any, **kwargs: Any) -> hook_points.LensHandle:
        """As in TransformerLens; a `partial` with a cached activation runs only on prompts with the layout of that cache."""
        return super().add_hook(on_its_own_prompts(hook), *args, **kwargs)


def on_its_own_prompts(hook: Callable) -> Callable:
    """The hook; if it is a `partial` with a cached activation, a hook that refuses prompts of another layout."""
    given = (*hook.args, *hook.keywords.values()) if isinstance(hook, partial) else ()
    shapes = [shape for value in given if (shape := getattr(value, PROMPT, None)) is not None]
    if not shapes:
        return hook

    def checked(activation: Tensor, hook: Any, original: Callable = hook) -> Any:
        running = running_prompt.get()
        for shape in shapes if running is not None else ():
            if why := shape.difference(running):
                raise ValueError(
                    f"{hook.name}: the activation that is put in comes from prompts whose positions are not those of the prompts "
                    f"that are run: {why}. Build both with images of one size and questions of one length, or pass "
                    f"cache.without_prompt() to move activations between other prompts on purpose."
                )
        return original(activation, hook=hook)

    return checked


def require_prompt(shape: Any, hook: Any, what: str) -> None:
    """Checks, for hooks that act at positions of one prompt, that the running prompts begin with the same layout.

    Args:
        shape: the prompt's (`geometry.PromptShape`). hook: the hook point. what: subject of the error message.
    Raises:
        ValueError: other padding, or images with another grid or place.
    """
    running = running_prompt.get()
    if running is not None and (why := shape.difference(running.beginning(shape.attention_mask.shape[1]))):
        raise ValueError(
            f"{hook.name}: {what} made for a prompt whose positions are not those of the prompts that are run: {why}. Make them "
            f"of the prompt that you run; rows that are laid out otherwise are run one by one."
        )


def listened(*hooks: nn.Module) -> bool:
    """Whether any of these modules has a hook, TransformerLens's or torch's own."""
    for hook in hooks:  # a plain loop, because this is called hundreds of times per token
        if hook._forward_hooks or hook._forward_pre_hooks or hook._backward_hooks or hook._backward_pre_hooks:
            return True
    return False


@torch.compiler.disable  # runs on the host at every call: compiled code does not notice hooks that come and go
def refuse_hooks(model: nn.Module) -> None:
    """Checks that a compiled model has no hooks, which its code would leave out, or run after they are removed.

    Raises:
        ValueError: hooks; the first are named.
    """
    names = [name or "the model" for name, module in model.named_modules() if listened(module)]
    if names:
        raise ValueError(
            f"a compiled model runs without hooks, but there are some at {', '.join(names[:3])}{', …' if len(names) > 3 else ''}: "
            f"torch.compile does not notice hooks that are added or removed. Run the model that was compiled, as it was before "
            f"torch.compile, or remove the hooks (model.reset_hooks())."
        )


def readable(weight: Tensor, name: str) -> Tensor:
    """The weight, after checking that it is in memory.

    Raises:
        RuntimeError: the weight is on the meta device (offloaded by accelerate), where reads give garbage and writes are lost.
    """
    if weight.is_meta:
        raise RuntimeError(
            f"{name} is offloaded: expected its numbers in memory, found a placeholder on the meta device. Load the "
            f"model without device_map, or with more memory, to read or edit weights."
        )
    return weight


def no_bias(like: Float[Tensor, "out in"], size: int) -> Float[Tensor, "size"]:
    """Zeros that cannot be written in place, for a bias that the model does not have and would not use."""
    device = "cpu" if like.is_meta else like.device  # an offloaded weight is on the meta device
    return torch.zeros(1, dtype=like.dtype, device=device).expand(size)


def bias_of(linear: nn.Linear, name: str) -> Float[Tensor, "out"]:
    """The layer's bias, or if it has none, zeros that cannot be written in place."""
    return no_bias(linear.weight, linear.out_features) if linear.bias is None else readable(linear.bias, name)


class RMSNorm(nn.Module):
    """x / rms(x) · w; statistics in float32, cast back before the multiplication by w, as in the reference."""

    def __init__(self, d: int, eps: float):
        super().__init__()
        self.eps = eps
        self.w = nn.Parameter(torch.empty(d))
        self.hook_scale = HookPoint()  # [batch, pos, 1]
        self.hook_normalized = HookPoint()  # [batch, pos, d], before the weight

    def forward(self, x: Float[Tensor, "batch pos *head d"]) -> Float[Tensor, "batch pos *head d"]:
        wide = _widen(x)
        scale = self.hook_scale(self.scale(wide))
        return self.hook_normalized((wide / scale).to(x.dtype)) * self.w

    def without_hooks(self, x: Float[Tensor, "batch pos *head d"]) -> Float[Tensor, "batch pos *head d"]:
        """The same without calling hooks, for the split inputs of single heads."""
        wide = _widen(x)
        return (wide / self.scale(wide)).to(x.dtype) * self.w

    def scale(self, x: Float[Tensor, "batch pos *head d"]) -> Float[Tensor, "batch pos *head 1"]:
        return (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()


class HeadNorm(RMSNorm):
    """RMSNorm of every head's query or key over d_head, with the hooks and shapes of TransformerLens's Qwen3 bridge."""

    def __init__(self, d_head: int, eps: float):
        super().__init__(d_head, eps)
        self.hook_in = HookPoint()  # [batch, head, pos, d_head]
        self.hook_out = HookPoint()  # [batch, head, pos, d_head]
        for hook in (self.hook_in, self.hook_scale, self.hook_normalized, self.hook_out):
            hook.pos_dim = 2

    def forward(self, x: Float[Tensor, "batch head pos d_head"]) -> Float[Tensor, "batch head pos d_head"]:
        return self.hook_out(super().forward(self.hook_in(x)))


class LayerNorm(nn.Module):
    """(x − mean) / std · w + b, statistics in float32; the tower's norm."""

    def __init__(self, d: int, eps: float):
        super().__init__()
        self.eps = eps
        self.w = nn.Parameter(torch.empty(d))
        self.b = nn.Parameter(torch.empty(d))
        self.hook_scale = HookPoint()  # [1, patch, 1]
        self.hook_normalized = HookPoint()  # [1, patch, d], before weight and bias, float32 or wider

    def forward(self, x: Float[Tensor, "batch pos *head d"]) -> Float[Tensor, "batch pos *head d"]:
        if not listened(self.hook_scale, self.hook_normalized):
            return self.without_hooks(x)
        wide = _widen(x)
        centred = wide - wide.mean(-1, keepdim=True)
        scale = self.hook_scale((centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        normalized = self.hook_normalized(centred / scale)
        return (normalized * _widen(self.w) + _widen(self.b)).to(x.dtype)

    def without_hooks(self, x: Float[Tensor, "batch pos *head d"]) -> Float[Tensor, "batch pos *head d"]:
        """The same without calling hooks."""
        return F.layer_norm(x, self.w.shape, self.w, self.b, self.eps)


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class GatedMLP(nn.Module):
    """SwiGLU, W_out(silu(x W_gate) · x W_in): the decoder's MLP, and with biases that of Qwen2.5-VL's tower."""

    def __init__(self, d_model: int, d_mlp: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_mlp, bias=bias)
        self.up_proj = nn.Linear(d_model, d_mlp, bias=bias)
        self.down_proj = nn.Linear(d_mlp, d_model, bias=bias)
        self.hook_pre = HookPoint()  # [batch, pos, d_mlp], the gate before silu
        self.hook_pre_linear = HookPoint()  # [batch, pos, d_mlp], multiplied by the gate
        self.hook_post = HookPoint()  # [batch, pos, d_mlp], the product

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        pre = self.hook_pre(self.gate_proj(x))
        pre_linear = self.hook_pre_linear(self.up_proj(x))
        return self.down_proj(self.hook_post(F.silu(pre) * pre_linear))

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        return readable(self.gate_proj.weight, "W_gate").T

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        return readable(self.up_proj.weight, "W_in").T

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        return readable(self.down_proj.weight, "W_out").T

    @property
    def b_gate(self) -> Float[Tensor, "d_mlp"]:
        return bias_of(self.gate_proj, "b_gate")

    @property
    def b_in(self) -> Float[Tensor, "d_mlp"]:
        return bias_of(self.up_proj, "b_in")

    @property
    def b_out(self) -> Float[Tensor, "d_model"]:
        return bias_of(self.down_proj, "b_out")


class MLP(nn.Module):
    """W_out(activation(x W_in + b_in)) + b_out: the tower's MLP, with quick_gelu in Qwen2-VL and tanh-GELU in Qwen3-VL."""

    def __init__(self, d_model: int, d_mlp: int, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(d_model, d_mlp)
        self.fc2 = nn.Linear(d_mlp, d_model)
        self.hook_pre = HookPoint()  # [1, patch, d_mlp]
        self.hook_post = HookPoint()  # [1, patch, d_mlp]

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        pre = self.hook_pre(self.fc1(x))
        return self.fc2(self.hook_post(self.activation(pre)))

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        return readable(self.fc1.weight, "W_in").T

    @property
    def b_in(self) -> Float[Tensor, "d_mlp"]:
        return readable(self.fc1.bias, "b_in")

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        return readable(self.fc2.weight, "W_out").T

    @property
    def b_out(self) -> Float[Tensor, "d_model"]:
        return readable(self.fc2.bias, "b_out")


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


gelu_tanh = partial(F.gelu, approximate="tanh")
