"""Attention knockout: which attention between segments of the prompt does the answer need, and in which layers?

1. Choose a flow: attention from some positions (keys) to others (queries), such as image → last.
2. For each layer, set the flow's attention scores to −inf before the softmax, in a window of layers centred on that layer.
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
    """How the answer's probability changes when a flow of attention is blocked.

    Attributes:
        effects: [flow layer item] percent change of the answer's probability; the layer is the window's centre.
        baseline: [item] the answer's probability with nothing blocked.
        flows: their names. window: number of layers blocked at once. skipped: how many items were left out as answered wrongly.
        model_name: of the model.
        images: [item] a key of the item's image, equal for items about one image; () if each item has its own.
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
        """One row per flow and layer: mean effect in percent, its standard error (clustered by image), number of items."""
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
        """One result with the items of several, of the same model, flows and window.

        Raises:
            ValueError: no result has an item, they differ in flows, window or model, or only some of them name their images.
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
    """Effect on the answer's probability of blocking each flow, in a window of layers around each layer.

    Args:
        inputs: one prompt or a batch; each row is run by itself, and its flows are resolved in that row.
        answers: for each row, the token id (or single-token string) whose probability is followed.
        flows: name -> (keys, queries), two places (see `Inputs.resolve`); None takes FLOWS.
        window: number of layers blocked at once, fewer at the ends; None takes max(1, round(L / 4)). The paper has 9.
        only_correct: leave out rows whose top-1 is not the answer, and count them.
    Raises:
        ValueError: the answers are not one for each row, a place is not in the prompt, or blocking leaves a query no key.
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
    """Hooks that block attention from the queries `target` to the keys `source`, in a plain run and in cached generation.

    Args:
        row: the row in which the places are resolved. The hooks act on every row of the run, so all rows need its layout.
        generated: also block attention to `source` from every token generated after the prompt.
    Raises:
        ValueError: (when run) a query is left without any key, or the prompts that are run have not the layout of
            `inputs[row]`: other padding, or images with other grids or at other positions.
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
    """The layers of the window around a layer, without those that the model does not have."""
    start = centre - (window - 1) // 2
    return range(max(0, start), min(n_layers, start + window))
