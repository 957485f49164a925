"""Attention knockout: which flows of information does the answer need, and in which layers?

1. Choose a flow: from some positions (keys) to others (queries), such as image → last.
2. In a window of layers centred on each layer, set those attention scores to −inf before the softmax.
3. Effect: 100 · (p_new − p_base) / p_base on the answer's first token, for items the model answers correctly.

Source: Geva et al. 2023 (Dissecting Recall); Cross-modal information flow in multimodal LLMs (CVPR 2025).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from analyses.common.result import Result
from analyses.common.statistics import standard_error
from hooked_qwen2vl.geometry import Place
from hooked_qwen2vl.layers import require_prompt
from hooked_qwen2vl.protocols import Model
from hooked_qwen2vl.running import attention_positions

FLOWS = {"image→question": ("image", "question"), "image→last": ("image", "last"), "question→last": ("question", "last")}


@dataclass(frozen=True)
class Knockout(Result):
    """Effects of blocking flows.

    Attributes:
        effects: [flow layer item] percent change of the answer's probability; the layer is the window's centre.
        baseline: [item] the answer's probability unblocked.
        flows: names. window: layers blocked at once. skipped: items answered wrongly, left out.
        model_name: of the model.
        images: [item] the same for items about one image; () where each item has its own.
        left_out: reason -> how many items could not be used at all.
    """

    effects: Float[Tensor, "flow layer item"]
    baseline: Float[Tensor, "item"]
    flows: tuple[str, ...]
    window: int
    skipped: int
    model_name: str
    images: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a flow and layer: mean effect in percent, its standard error over images (with all their items), items."""
        n = self.effects.shape[-1]
        return pd.DataFrame(
            {
                "flow": flow,
                "layer": layer,
                "effect_percent": float(self.effects[i, layer].mean()),
                "standard_error": standard_error(self.effects[i, layer].numpy(), self.images or None),
                "items": n,
            }
            for i, flow in enumerate(self.flows)
            for layer in range(self.effects.shape[1])
        )

    @classmethod
    def join(cls, parts: Sequence[Knockout]) -> Knockout:
        """The items of several results of the same model, flows and window.

        Raises:
            ValueError: none with an item in it, results of other flows, windows or models, or the images of only some are named.
        """
        if len(measured := {(part.flows, part.window, part.model_name) for part in parts}) > 1:
            said = "; ".join(f"{', '.join(flows)} in windows of {window} of {name}" for flows, window, name in sorted(measured))
            raise ValueError(f"expected results of one model, the same flows and one window, got {said}.")
        if not any(part.effects.shape[-1] for part in parts):
            raise ValueError("no item was answered rightly, so there is no effect to measure.")
        named = [part for part in parts if part.images]
        if named and any(not part.images and len(part.baseline) for part in parts):
            raise ValueError(f"{len(named)} of {len(parts)} results name the images of their items: name those of all, or of none.")
        return cls(
            torch.cat([part.effects for part in parts], -1),
            torch.cat([part.baseline for part in parts]),
            parts[0].flows,
            parts[0].window,
            sum(part.skipped for part in parts),
            parts[0].model_name,
            sum((part.images for part in parts), ()),
            dict(sum((Counter(part.left_out) for part in parts), Counter())),
        )

    def plot(self, path: Any = None) -> Any:
        """Mean effect of each flow by layer, with its standard error."""
        from analyses.views.trajectories import knockout_plot

        return knockout_plot(self, path)


@torch.no_grad()
def attention_knockout(
    model: Model,
    inputs: Any,
    answers: Sequence[int] | Sequence[str],
    flows: Mapping[str, tuple[Place, Place]] | None = None,
    window: int | None = None,
    only_correct: bool = True,
    progress: bool = True,
) -> Knockout:
    """Blocks each flow in a window around each layer.

    Args:
        inputs: one prompt or a batch; each row is run on its own (its spans are its own).
        answers: for each row, the token id (or single-token string) whose probability is followed.
        flows: name -> (from, to), two places (see `Inputs.resolve`).
        window: layers blocked at once, clipped at the ends; None takes max(1, round(L / 4)). The paper has 9.
        only_correct: leave out rows whose top-1 is not the answer, and count them.
    Raises:
        ValueError: as many answers as rows are wanted; a span is not there; or blocking leaves a query no key.
    """
    if len(answers) != len(inputs):
        raise ValueError(f"expected one answer for each of {len(inputs)} rows, got {len(answers)}.")
    ids = [model.to_single_token(answer) if isinstance(answer, str) else int(answer) for answer in answers]
    flows = FLOWS if flows is None else flows
    n_layers = model.cfg.n_layers
    window = max(1, round(n_layers / 4)) if window is None else window
    if not 1 <= window <= n_layers:
        raise ValueError(f"window must be in 1..{n_layers}, got {window}.")
    inputs = model.encode(inputs)
    effects, baseline, skipped = [], [], 0
    for row, answer in enumerate(tqdm(ids, desc="knockout", unit="item", disable=not progress, delay=2)):
        item = inputs[row]
        last = int(item.positions("last")[0])
        base = model(item, logits_at=last)[0, 0].float().softmax(-1)
        if only_correct and int(base.argmax()) != answer:
            skipped += 1
            continue
        cells = torch.zeros(len(flows), n_layers)
        for number, (source, target) in enumerate(flows.values()):
            for centre in range(n_layers):
                hooks = knockout_hooks(item, source, target, layers_around(centre, window, n_layers))
                new = model.run_with_hooks(item, fwd_hooks=hooks, logits_at=last)[0, 0].float().softmax(-1)
                cells[number, centre] = 100 * (new[answer] - base[answer]) / base[answer]
        effects.append(cells)
        baseline.append(float(base[answer]))
    stacked = torch.stack(effects, -1) if effects else torch.zeros(len(flows), n_layers, 0)
    return Knockout(stacked, torch.tensor(baseline), tuple(flows), window, skipped, str(model.cfg.model_name))


def knockout_hooks(
    inputs: Any, source: Place, target: Place, layers: Sequence[int], row: int = 0, generated: bool = False
) -> list[tuple[str, Callable]]:
    """Hooks that stop attention from `source` (keys) to `target` (queries), in a plain run and in cached generation.

    Args:
        row: the prompt whose spans are meant; the hooks act on every row of what is run, so all must be laid out like it.
        generated: also block every token generated after the prompt from seeing `source`.
    Raises:
        ValueError: (when run) a query is left without any key, or the prompts that are run do not begin as `inputs[row]` does:
            other padding, or images of another grid or place.
    """
    keys, queries = inputs.resolve(source, row).cpu(), inputs.resolve(target, row).cpu()
    prompt, shape = inputs.shape[1], inputs.prompt_shape.rows(row)

    def hook(scores: Tensor, hook: Any) -> Tensor:
        require_prompt(shape, hook, "these knockout hooks were")
        at, seen = attention_positions(*scores.shape[-2:])
        blocked = torch.isin(at, queries) | ((at >= prompt) if generated else False)
        rows, columns = blocked.nonzero()[:, 0], torch.isin(seen, keys).nonzero()[:, 0]
        if not len(rows) or not len(columns):
            return scores
        before = scores[:, :, rows].isfinite().any(-1)
        scores[:, :, rows[:, None], columns] = float("-inf")
        if bool((before & ~scores[:, :, rows].isfinite().any(-1)).any()):
            raise ValueError(f"{hook.name}: blocking leaves a query no key to attend to; block less.")
        return scores

    return [(f"blocks.{layer}.attn.hook_attn_scores", hook) for layer in layers]


def layers_around(centre: int, window: int, n_layers: int) -> range:
    """The window's layers, clipped to the model."""
    start = centre - (window - 1) // 2
    return range(max(0, start), min(n_layers, start + window))
