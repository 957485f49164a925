"""Edge attribution patching, with grouped heads and with integrated gradients.

EAP (Syed, Rager and Conmy 2023) estimates, to first order, the effect of the edge from a writer u (the embedding, a head, an
MLP, or in Qwen3-VL what DeepStack adds) to a reader v (a head's query, key or value input, an MLP's input, or the logits):

    score(u → v) = Σ_pos (a_u^clean − a_u^corrupted) · ∂metric/∂(input of v)

1. Run both prompts and cache the output of every writer; clean minus corrupted is the writer's delta.
2. Run the corrupted prompt with gradients, and take the metric's gradient at the input of every reader.
3. Multiply. If the reader comes before the writer there is no edge, and the score is 0.

EAP-IG (Hanna, Pezzelle and Belinkov 2024): the gradient of step 2 is the mean over `ig_steps` points on the straight line
from the corrupted to the clean embedding (what DeepStack adds moves along with it). This corrects for saturation. With many
steps, the sum of the embedding's (and DeepStack's) contributions tends to metric(clean) − metric(corrupted) (completeness).

Readers of keys and values are key-value heads. Models with grouped-query attention have fewer of them than heads;
TransformerLens's own tool refuses such models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from analyses.common.prompts import as_prompt
from analyses.common.result import Result
from hooked_qwen2vl.geometry import refuse_unaligned
from hooked_qwen2vl.protocols import Model

Metric = Callable[[Float[Tensor, "batch pos d_vocab"]], Float[Tensor, ""]]


@dataclass(frozen=True)
class EdgeAttribution(Result):
    """First-order effect of every edge on the metric.

    Attributes:
        scores: [writer reader] in the metric's units, positive if patching the clean value into the edge raises the metric;
            0 if there is no edge.
        edges: [writer reader] whether the writer comes before the reader.
        writers: "embed", (in Qwen3-VL) "DeepStack0" …, "L0H0" …, "MLP0" ….
        readers: "L0H0.q" …, "L0H0.k" … (key-value heads), "MLP0", "logits".
        ig_steps: 1 for plain EAP.
        model_name: name of the model.
    """

    scores: Float[Tensor, "writer reader"]
    edges: Bool[Tensor, "writer reader"]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    ig_steps: int
    model_name: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row per edge, largest effect first."""
        rows, columns = self.edges.nonzero(as_tuple=True)
        table = pd.DataFrame(
            {
                "writer": [self.writers[i] for i in rows],
                "reader": [self.readers[i] for i in columns],
                "score": self.scores[rows, columns].tolist(),
            }
        )
        return table.sort_values("score", key=abs, ascending=False, ignore_index=True)

    def plot(self, path: Any = None) -> Any:
        """Writers × readers, coloured by score."""
        from analyses.views.maps import signed_map

        title = f"Edge attribution{' (integrated gradients)' if self.ig_steps > 1 else ''}, {self.model_name}"
        return signed_map(self.scores.masked_fill(~self.edges, float("nan")), self.writers, self.readers, title, path)


def edge_attribution(model: Model, clean: Any, corrupted: Any, metric: Metric, ig_steps: int = 1, progress: bool = True) -> EdgeAttribution:
    """Scores every edge.

    Args:
        clean, corrupted: prompts with the same layout (images: the same grids).
        metric: a function of the logits that returns a scalar.
        ig_steps: points on the line between the embeddings; 1 takes the gradient at the corrupted prompt.
    Raises:
        ValueError: prompts whose positions do not correspond, ig_steps below 1, or a metric that is not a scalar.
    """
    clean, corrupted = as_prompt(model, clean), as_prompt(model, corrupted)
    refuse_unaligned(clean, corrupted, "the clean and the corrupted prompts")
    if ig_steps < 1:
        raise ValueError(f"ig_steps must be at least 1, got {ig_steps}.")
    with torch.no_grad():
        ours, theirs = (_writes(model, inputs) for inputs in (clean, corrupted))
    delta = ours - theirs
    begins = ["hook_embed", *_deepstack_hooks(model.cfg)]  # set in every run; the other activations follow
    total = torch.zeros(0)
    # EAP: the gradient at the corrupted end of the line; EAP-IG: at the middle of each step
    fractions = [0.0] if ig_steps == 1 else [(step + 0.5) / ig_steps for step in range(ig_steps)]
    for fraction in tqdm(fractions, desc="gradients", disable=not progress, delay=2):
        given = {name: theirs[n] + fraction * delta[n] for n, name in enumerate(begins)}
        gradients = _reader_gradients(model, corrupted, metric, given)
        total = gradients if not len(total) else total + gradients
    scores = torch.einsum("wbpm,rbpm->wr", delta, total / len(fractions)).cpu()
    edges = _edges(model.cfg)
    return EdgeAttribution(
        scores=scores * edges,
        edges=edges,
        writers=tuple(_writer_names(model.cfg)),
        readers=tuple(_reader_names(model.cfg)),
        ig_steps=ig_steps,
        model_name=str(model.cfg.model_name),
    )


def _writes(model: Model, inputs: Any) -> Float[Tensor, "writer batch pos d_model"]:
    """What the embedding, every head, every MLP and DeepStack add to the residual stream."""
    layers = range(model.cfg.n_layers)
    names = ["hook_embed", *_deepstack_hooks(model.cfg)]
    names += [f"blocks.{layer}.{hook}" for layer in layers for hook in ("attn.hook_result", "hook_mlp_out")]
    _, cache = model.run_with_cache(inputs, names_filter=names)
    parts = [cache["hook_embed"][None], *(cache[name][None] for name in _deepstack_hooks(model.cfg))]
    for layer in layers:
        parts += [cache["result", layer].movedim(2, 0), cache["mlp_out", layer][None]]
    return torch.cat(parts)


def _reader_gradients(
    model: Model, inputs: Any, metric: Metric, given: dict[str, Float[Tensor, "batch pos d_model"]]
) -> Float[Tensor, "reader batch pos d_model"]:
    """The metric's gradient at every reader's own copy of the residual stream, in a run with the activations `given`."""
    layers = range(model.cfg.n_layers)
    names = [
        f"blocks.{layer}.{hook}"
        for layer in layers
        for hook in ("attn.hook_q_input", "attn.hook_k_input", "attn.hook_v_input", "hook_mlp_in")
    ]
    names.append(f"blocks.{model.cfg.n_layers - 1}.hook_resid_post")
    kept: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any) -> None:
        kept[hook.name] = activation

    def begin(activation: Tensor, hook: Any) -> Tensor:
        return given[hook.name].detach().clone().requires_grad_()

    with torch.enable_grad():
        logits = model.run_with_hooks(inputs, fwd_hooks=[*((name, begin) for name in given), *((name, keep) for name in names)])
        value = metric(logits)
        if value.ndim:
            raise ValueError(f"the metric must be a scalar, got shape {tuple(value.shape)}: take its mean.")
        gradients = torch.autograd.grad(value, [kept[name] for name in names])
    heads_first = [g.movedim(2, 0) if g.ndim == 4 else g[None] for g in gradients]
    return torch.cat(heads_first)


def _deepstack_hooks(cfg: Any) -> list[str]:
    """Hook points of what DeepStack adds to the residual stream, in order of blocks; empty for models without DeepStack."""
    merged = getattr(getattr(cfg, "vision", None), "deepstack_layers", ())
    return [f"blocks.{layer}.hook_deepstack" for layer, _ in enumerate(merged)]


def _writer_names(cfg: Any) -> list[str]:
    names = ["embed", *(f"DeepStack{number}" for number, _ in enumerate(_deepstack_hooks(cfg)))]
    for layer in range(cfg.n_layers):
        names += [*(f"L{layer}H{head}" for head in range(cfg.n_heads)), f"MLP{layer}"]
    return names


def _reader_names(cfg: Any) -> list[str]:
    names = []
    for layer in range(cfg.n_layers):
        names += [f"L{layer}H{head}.q" for head in range(cfg.n_heads)]
        names += [f"L{layer}H{head}.{part}" for part in "kv" for head in range(cfg.n_key_value_heads)]
        names.append(f"MLP{layer}")
    return [*names, "logits"]


def _edges(cfg: Any) -> Bool[Tensor, "writer reader"]:
    """Whether each writer comes before each reader, by a number for the depth at which they write and read."""
    written, read = [-1.0, *(number + 0.6 for number, _ in enumerate(_deepstack_hooks(cfg)))], []
    for layer in range(cfg.n_layers):
        written += [layer] * cfg.n_heads + [layer + 0.5]
        read += [layer - 0.25] * (cfg.n_heads + 2 * cfg.n_key_value_heads) + [layer + 0.25]
    read.append(cfg.n_layers)
    return torch.tensor(written)[:, None] < torch.tensor(read)[None, :]
