"""The tuned lens: a learned affine map for each layer, applied before the logit lens (Belrose et al., arXiv 2303.08112).

1. Translators T_l(h) = h + A_l h + b_l for the layers l = 0..L−1. A_l and b_l start at 0, which is exactly the logit lens.
   Layer L gives the model's own prediction and is not translated.
2. Run the user's prompts; keep the residual streams. The model's weights are not changed.
3. Minimise the mean over l of KL(p_L ‖ softmax(W_U · norm(T_l(h_l)))), nats, with Adam on random batches of positions
   (the authors use SGD with momentum).

Use a fitted lens as `logit_lens(model, inputs, translator=lens)`, `lens(stack)` for a whole residual stack, or
`lens.translate(vectors, layer)` for one layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import trange
from transformer_lens.tools.analysis import logit_readout

from analyses.common.prompts import as_prompt
from analyses.common.vocabulary import logits_of
from analyses.logit_lens import residual_stack
from hooked_qwen2vl.protocols import Model

_CHUNK = 64


class TunedLens(nn.Module):
    """Translators for every layer but the last.

    Attributes:
        A: [layer d_model d_model], b: [layer d_model] for the layers 0..L−1, float32.
        model_name: name of the model they were fitted to.
        losses: loss at each step of the fit, nats; () for a lens that was loaded or not fitted.
    """

    def __init__(self, n_layers: int, d_model: int, model_name: str = ""):
        super().__init__()
        self.A = nn.Parameter(torch.zeros(n_layers, d_model, d_model))
        self.b = nn.Parameter(torch.zeros(n_layers, d_model))
        self.model_name, self.losses = model_name, ()

    def forward(self, stack: Float[Tensor, "layer *axes d_model"]) -> Float[Tensor, "layer *axes d_model"]:
        """The translated residual stack, in the stack's dtype; layer L is unchanged.

        Args:
            stack: all L+1 layers, in order.
        Raises:
            ValueError: another number of layers, or another d_model.
        """
        n_layers, d_model = self.b.shape
        if stack.shape[0] != n_layers + 1 or stack.shape[-1] != d_model:
            raise ValueError(f"expected the {n_layers + 1} layers of a residual stack of width {d_model}, got {tuple(stack.shape)}.")
        return torch.stack([self.translate(vectors, layer) for layer, vectors in enumerate(stack)])

    def translate(self, vectors: Float[Tensor, "*axes d_model"], layer: int) -> Float[Tensor, "*axes d_model"]:
        """T_l of vectors from one layer, in their dtype; layer L is unchanged.

        Raises:
            ValueError: no such layer, or another d_model.
        """
        n_layers, d_model = self.b.shape
        if not 0 <= layer <= n_layers or vectors.shape[-1] != d_model:
            raise ValueError(f"this lens is for the layers 0..{n_layers} of width {d_model}, got layer {layer} and {tuple(vectors.shape)}.")
        if layer == n_layers:
            return vectors
        A, b = self.A[layer].to(vectors.device), self.b[layer].to(vectors.device)
        return (vectors.float() + vectors.float() @ A.T + b).to(vectors.dtype)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, path, metadata={"model_name": self.model_name})

    @classmethod
    def load(cls, path: str | Path) -> TunedLens:
        """Reads a lens that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, or has other tensors than A and b.
        """
        try:
            with safe_open(path, "pt") as file:
                if set(file.keys()) != {"A", "b"}:
                    raise ValueError(f"{path} is no tuned lens: expected the tensors A and b, got {sorted(file.keys())}.")
                A, b = file.get_tensor("A"), file.get_tensor("b")
                name = (file.metadata() or {}).get("model_name", "")
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read as safetensors ({error}): it is damaged or another kind of file.") from error
        n_layers, d_model = b.shape
        lens = cls(n_layers, d_model, name)
        lens.load_state_dict({"A": A, "b": b})
        return lens


@torch.enable_grad()
def fit_tuned_lens(
    model: Model,
    prompts: Iterable[Any],
    steps: int = 300,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> TunedLens:
    """Fits translators to a model on the user's prompts, with or without images; works under `torch.no_grad`, too.

    Args:
        prompts: `Inputs`, strings or token ids; all positions but padding are used.
        steps: number of steps of Adam, each on `batch_size` random positions; the learning rate falls linearly to 0.
    Raises:
        ValueError: no prompts, or steps or batch_size below 1.
    """
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}.")
    stack, goal = _streams(model, prompts)
    lens = TunedLens(model.cfg.n_layers, model.cfg.d_model, str(model.cfg.model_name))
    optimizer = torch.optim.Adam(lens.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in trange(steps, desc="tuned lens", unit="step", disable=not progress, delay=2):
        batch = torch.randint(stack.shape[1], (min(batch_size, stack.shape[1]),), generator=generator)
        loss = _kl(model, lens(stack[:, batch])[:-1], goal[batch]).mean()
        gradients = torch.autograd.grad(loss, list(lens.parameters()))  # the model's own .grad stay unchanged
        for parameter, gradient in zip(lens.parameters(), gradients):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    lens.losses = tuple(losses)
    return lens.requires_grad_(False)


@torch.no_grad()
def kl_by_layer(model: Model, prompts: Iterable[Any], translator: TunedLens | None = None) -> pd.DataFrame:
    """KL(p_L ‖ p_l) in nats, mean over the prompts' positions, for each layer 0..L−1; without a translator: of the logit lens.

    Raises:
        ValueError: no prompts.
    """
    stack, goal = _streams(model, prompts)
    stack = stack if translator is None else translator(stack)
    return pd.DataFrame({"layer": range(len(stack) - 1), "kl_nats": _kl(model, stack[:-1], goal).mean(-1).tolist()})


@torch.no_grad()
def _streams(model: Model, prompts: Iterable[Any]) -> tuple[Float[Tensor, "layer n d_model"], Float[Tensor, "n d_model"]]:
    """(residual stack over all positions but padding, its last layer), float32."""
    parts = []
    for prompt in prompts:
        stack, _ = residual_stack(model, prompt)
        parts.append(stack[:, as_prompt(model, prompt).attention_mask.bool().to(stack.device)])
    if not parts:
        raise ValueError("expected at least one prompt to fit the lens on, got none.")
    stack = torch.cat(parts, dim=1).float()
    return stack, stack[-1]


def _kl(model: Model, stack: Float[Tensor, "layer n d_model"], goal: Float[Tensor, "n d_model"]) -> Float[Tensor, "layer n"]:
    """KL(p_L ‖ p_l) of every row, computed in chunks of rows."""
    parts = []
    for start in range(0, len(goal), _CHUNK):
        rows = slice(start, start + _CHUNK)
        ours = _log_probs(model, stack[:, rows])
        theirs = _log_probs(model, goal[rows])
        parts.append((theirs.exp() * (theirs - ours)).sum(-1))
    return torch.cat(parts, dim=1)


def _log_probs(model: Model, vectors: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_vocab"]:
    """Log-probabilities by `logits_of`, as in the other lenses; while fitting by TransformerLens's readout, which has gradients."""
    if not torch.is_grad_enabled():
        return logits_of(model, vectors).log_softmax(-1)
    return logit_readout(model, vectors, return_type="log_probs", chunk_size=10**9, enable_grad=True).values.float()
