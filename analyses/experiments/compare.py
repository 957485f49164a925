"""Comparison of models on the same questions, aligned by relative depth.

1. Every model gets the same questions with its own tokenizer: in its chat template if it has one, else as plain text; with
   the image (models that take images), with a description of the scene in words, and with neither.
2. Lens and trajectory, at the last position: layer l of L has depth l / L. Entropy is a share of ln(d_vocab), because
   vocabularies differ in size.
3. Patching: the same question about a counterfactual scene is the corrupted run. At each layer, the clean residual stream is
   patched in at the positions where the prompts differ, or at the last position. The metric is max z over the first tokens of
   the answer − max z over those of the counterfactual answer. Recovery = (patched − corrupted) / (clean − corrupted), averaged
   with weights |clean − corrupted| (our choice: pairs that hardly differ dominate a plain mean of ratios). The first curve shows
   at which depth the answer leaves the scene's positions, the second at which depth it reaches the last position. In any causal
   decoder the first goes from exactly 1 to 0, the second from 0 to 1. If a tokenizer gives the two prompts different lengths, the
   pair is left out and counted, because positions would not correspond.
4. Heads: see `attention_heads`. Block l is between the layers l and l + 1, at depth (l + ½) / L.

If some model's tokenizer gives the candidates of a question the same first token, the question is left out for all models, and
counted, so that all models answer the same questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from analyses.attention_heads import PASSAGE, AttentionHeads, detect_heads, text_tokens
from analyses.common.result import Result
from analyses.data.examples import Example
from analyses.logit_lens import logit_lens, residual_stack
from analyses.trajectory import NoFirstToken, Trajectories, answer_ids, answer_trajectory
from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.prompt_text import Segment, special_tokens, tokenize_segments
from hooked_qwen2vl.protocols import Model

CONDITIONS = ("image", "words", "neither")
MEASURES = ("answer_prob", "entropy_share", "final_prob", "recovery_scene", "recovery_last")
_PLACE = "\ue000"  # a private-use character that marks the question's place in a rendered template
_EPSILON = 1e-3  # logits; pairs whose clean and corrupted metrics are closer than this are left out


@dataclass(frozen=True)
class Run(Result):
    """One model under one condition.

    Attributes:
        model, condition: names.
        trajectories: of each question's answer.
        entropy_share: [item layer] entropy / ln(d_vocab). final_prob: [item layer] probability of the last layer's top token.
        recovery_scene, recovery_last: [pair layer], see step 3 above. gap: [pair] |clean − corrupted|, in logits.
        unaligned, small: numbers of pairs left out, for different lengths or too small a gap.
    """

    model: str
    condition: str
    trajectories: Trajectories
    entropy_share: Float[Tensor, "item layer"]
    final_prob: Float[Tensor, "item layer"]
    recovery_scene: Float[Tensor, "pair layer"]
    recovery_last: Float[Tensor, "pair layer"]
    gap: Float[Tensor, "pair"]
    unaligned: int
    small: int

    @property
    def answer_prob(self) -> Float[Tensor, "item layer"]:
        """Probability of the answer's first token at each layer."""
        return torch.stack([item.answer_prob for item in self.trajectories.items])

    def curve(self, measure: str) -> tuple[np.ndarray, np.ndarray] | None:
        """(depth of each layer, mean over items) of one of MEASURES; None if no item has it."""
        values = getattr(self, measure)
        if not len(values):
            return None
        weights = self.gap if measure.startswith("recovery") else None
        return np.linspace(0, 1, values.shape[1]), np.average(values.double().numpy(), axis=0, weights=weights)

    def summary(self) -> dict[str, Any]:
        """The summary figures; depths are fractions of L, and medians are over the questions that have a value."""
        table = self.trajectories.to_dataframe()
        items = self.trajectories.items
        named = [t for t in items if t.candidates]
        return {
            "model": self.model,
            "condition": self.condition,
            "layers": items[0].n_layers,
            "items": len(items),
            "right": float(table["right"].mean()),
            "right_of_candidates": _mean([t.candidates[int(t.candidates_top[-1])] == t.answer for t in named]),
            "answer_prob": float(table["final_prob"].mean()),
            "ever_first": float(table["birth_1"].notna().mean()),
            "first_depth": float(table["birth_1_depth"].astype(float).median()),
            "settled_depth": float(table["stability_depth"].median()),
            "flips": float(table["flips"].mean()),
            "final_entropy_share": float(self.entropy_share[:, -1].mean()),
            "pairs": len(self.gap),
            "pairs_unaligned": self.unaligned,
            "pairs_without_gap": self.small,
            "leaves_scene_depth": _crossing(self.curve("recovery_scene"), falling=True),
            "reaches_last_depth": _crossing(self.curve("recovery_last"), falling=False),
        }


@dataclass(frozen=True)
class Comparison(Result):
    """Several models on the same questions.

    Attributes:
        runs: one per model and condition.
        heads: model -> scores of its heads.
        skipped: number of questions left out, because some tokenizer gives their candidates the same first token.
    """

    runs: tuple[Run, ...]
    heads: Mapping[str, AttentionHeads]
    skipped: int

    def to_dataframe(self) -> pd.DataFrame:
        """One row per model and condition: `Run.summary`, and the model's best head of each kind (score and depth)."""
        return pd.DataFrame([run.summary() | _best_heads(self.heads[run.model]) for run in self.runs])

    def curves(self, depths: Sequence[float] | None = None) -> pd.DataFrame:
        """One row per model, condition, measure and depth (0 the embedding, 1 the output): the mean over items.

        Args:
            depths: a grid to which the curves are interpolated linearly; None: each model's own layers.
        """
        rows = []
        for run in self.runs:
            for measure in MEASURES:
                if (curve := run.curve(measure)) is None:
                    continue
                grid = curve[0] if depths is None else np.asarray(depths, dtype=float)
                for depth, value in zip(grid, np.interp(grid, *curve)):
                    rows.append((run.model, run.condition, measure, depth, value))
        return pd.DataFrame(rows, columns=["model", "condition", "measure", "depth", "value"])

    def plot(self, path: Any = None) -> Any:
        """Every measure by relative depth; one colour per model, one line style per condition."""
        from analyses.views.compare import comparison_plot

        return comparison_plot(self, path)


@torch.no_grad()
def compare_models(
    models: Mapping[str, Any],
    examples: Sequence[Example],
    conditions: Sequence[str] = CONDITIONS,
    describe: Callable[[Example], str | None] | None = None,
    passage: str = PASSAGE,
    progress: bool = True,
) -> Comparison:
    """Compares models on the same questions: lens, trajectory, patching and heads (see the module's docstring).

    Args:
        models: name -> a HookedQwen2VL, or any other TransformerLens model with a tokenizer (text only).
        examples: questions (`analyses.data.examples`); only questions about the embedded world have counterfactuals, for patching.
        conditions: of CONDITIONS; text-only models are left out of "image".
        describe: example -> its scene in words, or None; by default the caption of the embedded world.
        passage: text for the heads; the prompt has it twice.
    Raises:
        ValueError: no models, no questions left, an unknown condition, or a condition that no model and example has.
    """
    unknown = [condition for condition in conditions if condition not in CONDITIONS]
    if unknown or not models:
        raise ValueError(f"expected models, and conditions of {', '.join(CONDITIONS)}, got {list(models)} and {unknown}.")
    describe = _caption if describe is None else describe
    kept = [example for example in examples if all(_tells_apart(model, example) for model in models.values())]
    if not kept:
        raise ValueError(f"none of {len(examples)} questions has an answer whose first token every tokenizer tells apart.")
    runs = []
    bar = tqdm(total=len(models) * len(conditions) * len(kept), desc="compare", unit="run", disable=not progress, delay=2)
    for name, model in models.items():
        for condition in conditions:
            if run := _run(name, model, kept, condition, describe, bar):
                runs.append(run)
    bar.close()
    if missing := set(conditions) - {run.condition for run in runs}:
        raise ValueError(f"no model and question has the condition {', '.join(sorted(missing))}: leave it out.")
    picture = next((example.item.image for example in kept if example.item is not None), None)
    heads = {name: detect_heads(m, passage, picture if _sees(m) else None) for name, m in models.items()}
    return Comparison(tuple(runs), heads, len(examples) - len(kept))


def compare_tuned(
    base: str | Path, adapter: str | Path, examples: Sequence[Example], conditions: Sequence[str] = CONDITIONS, **load: Any
) -> Comparison:
    """`compare_models` of a base model ("base") and the same model with a LoRA adapter merged in ("tuned").

    Args:
        base, adapter: folders or hub ids. load: further arguments of `HookedQwen2VL.from_pretrained`, for both (dtype, device).
    Raises:
        ValueError: as `from_pretrained` and `compare_models`.
    """
    models = {"base": HookedQwen2VL.from_pretrained(base, **load), "tuned": HookedQwen2VL.from_pretrained(base, adapter=adapter, **load)}
    return compare_models(models, examples, conditions)


def _chat_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a user turn in the tokenizer's chat template; special tokens spelt in the text are read as text."""

    def render(content: str) -> str:
        said = [{"role": "user", "content": content}]
        return tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)

    if not any(token in text for token in special_tokens(tokenizer)):
        return tokenizer(render(text), add_special_tokens=False)["input_ids"]
    before, _, after = render(_PLACE).partition(_PLACE)
    return tokenize_segments(tokenizer, [Segment(before, "template"), Segment(text, "question", typed=True), Segment(after, "template")])[0]


def ask(model: Model, text: str, images: Sequence[Any] = ()) -> Any:
    """A question as a prompt for the model: `Inputs` with chat template, or token ids [1 pos] for a text-only model.

    A text-only model's chat template is used if its tokenizer has one; else the question is followed by a line "Answer:".
    """
    if _sees(model):
        return model.encode(model.to_inputs(text, images=list(images)))
    if getattr(model.tokenizer, "chat_template", None):
        return torch.tensor([_chat_ids(model.tokenizer, text)], device=model.cfg.device)
    return text_tokens(model, f"{text}\nAnswer:")


@torch.no_grad()
def patch_by_depth(
    model: Model,
    clean: Any,
    corrupted: Any,
    metric: Callable[[Float[Tensor, "d_vocab"]], Tensor],
    places: Sequence[int],
) -> tuple[Float[Tensor, "layer"], float]:
    """Recovery when the clean residual stream is patched in at some positions, for every layer 0..L; for any TransformerLens model.

    Args:
        clean, corrupted: prompts of one row each, of the same length.
        metric: a function of the logits at the last position that returns a number.
        places: positions to patch.
    Returns:
        (recovery at each layer, the gap |clean − corrupted|); the recovery is NaN if the gap is below 0.001.
    """
    n_layers = model.cfg.n_layers
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(n_layers)] + [f"blocks.{n_layers - 1}.hook_resid_post"]
    logits, cache = model.run_with_cache(clean, names_filter=names)
    best, worst = metric(logits[0, -1]), metric(model(corrupted)[0, -1])
    gap = float((best - worst).abs())
    if gap < _EPSILON:
        return torch.full((n_layers + 1,), float("nan")), gap
    at = torch.as_tensor(list(places))

    def put(stream: Float[Tensor, "1 pos d_model"], hook: Any, name: str) -> Tensor:
        stream = stream.clone()
        stream[:, at] = cache[name][:, at]
        return stream

    def patched(name: str) -> Tensor:
        hooks = [(name, lambda stream, hook: put(stream, hook, name))]
        return metric(model.run_with_hooks(corrupted, fwd_hooks=hooks)[0, -1])

    return torch.stack([(patched(name) - worst) / (best - worst) for name in names]).float().cpu(), gap


@torch.no_grad()
def text_agreement(model: Model, twin: Any, texts: Sequence[str], tolerance: float = 1e-5) -> pd.DataFrame:
    """Compares the text decoder with the same weights as a Qwen2 model (`model.export_text_model`), on text-only prompts.

    Args:
        twin: a TransformerLens model loaded from the exported folder.
        tolerance: largest allowed difference, as a share of the twin's standard deviation.
    Returns:
        one row per text and layer, and one for the logits: largest absolute difference, the same as a share, and `ok`.
    """
    rows = []
    for text in texts:
        tokens = ask(twin, text)
        (ours, labels), (theirs, _) = residual_stack(model, tokens), residual_stack(twin, tokens)
        pairs = [*zip(labels, ours, theirs), ("logits", model(tokens), twin(tokens))]
        for label, one, other in pairs:
            error = float((one.cpu() - other.cpu()).abs().max())
            share = error / float(other.std())
            rows.append({"text": text, "layer_label": label, "error": error, "share": share, "ok": share <= tolerance})
    return pd.DataFrame(rows)


# ---- one model, one condition -------------------------------------------------------------------------


def _run(name: str, model: Model, examples: Sequence[Example], condition: str, describe: Callable, bar: Any) -> Run | None:
    items, entropy, final, patched = [], [], [], []
    unaligned = small = 0
    for example in examples:
        bar.update()
        prompt = _prompt(model, example, condition, describe)
        if prompt is None:
            continue
        lens = logit_lens(model, prompt)
        items.append(answer_trajectory(model, prompt, example.answer, example.candidates, category=example.category,
                                       question=example.question))  # fmt: skip
        entropy.append(lens.entropy[:, 0] / np.log(model.cfg.d_vocab))
        final.append(lens.final_probs[:, 0])
        other = _counterfactual(example)
        corrupted = None if other is None else _prompt(model, other, condition, describe)
        if other is None or corrupted is None or _same(prompt, corrupted):
            continue
        places = _differing(prompt, corrupted)
        if places is None:
            unaligned += 1
            continue
        metric = _difference(model, example, other)
        (scene, gap), (last, _) = (patch_by_depth(model, prompt, corrupted, metric, at) for at in (places, [-1]))
        if gap < _EPSILON:
            small += 1
        else:
            patched.append((scene, last, torch.tensor(gap)))
    if not items:
        return None
    empty = torch.zeros(0, model.cfg.n_layers + 1)
    scene, last, gaps = map(torch.stack, zip(*patched)) if patched else (empty, empty, empty[:, 0])
    return Run(name, condition, Trajectories(tuple(items)), torch.stack(entropy), torch.stack(final), scene, last, gaps, unaligned, small)


def _prompt(model: Model, example: Example, condition: str, describe: Callable) -> Any:
    if condition == "image":
        return ask(model, example.question, example.images) if _sees(model) and example.images else None
    if condition == "neither":
        return ask(model, example.question)
    words = describe(example)
    return ask(model, f"{words}\n{example.question}") if words else None


def _counterfactual(example: Example) -> Example | None:
    """The same question about the counterfactual scene; None if the example has none."""
    other = getattr(example.item, "counterfactual", None)
    if other is None or not example.candidates:
        return None
    return Example(example.id, other.question, other.answer, (other.image,), candidates=other.candidates, item=other)


def _caption(example: Example) -> str | None:
    return getattr(example.item, "caption", None)


def _difference(model: Model, example: Example, other: Example) -> Callable[[Tensor], Tensor]:
    ours, theirs = (answer_ids(model, e.answer, example.candidates)[0] for e in (example, other))
    return lambda logits: logits[ours].max() - logits[theirs].max()


def _same(prompt: Any, other: Any) -> bool:
    """Whether the two prompts are equal, so that there is nothing to patch."""
    return prompt == other if hasattr(prompt, "visuals") else torch.equal(prompt, other)


def _differing(prompt: Any, other: Any) -> list[int] | None:
    """Positions at which two prompts differ: of their tokens, or all image tokens if they have images; None if they are not aligned."""
    if prompt.shape != other.shape:
        return None
    if getattr(prompt, "visuals", ()):
        return prompt.positions("image").tolist() if torch.equal(prompt.position_ids, other.position_ids) else None
    ours, theirs = getattr(prompt, "tokens", prompt), getattr(other, "tokens", other)
    return (ours != theirs)[0].nonzero().flatten().tolist()


def _sees(model: Model) -> bool:
    return hasattr(model, "to_inputs")


def _tells_apart(model: Model, example: Example) -> bool:
    other = _counterfactual(example)
    answers = {example.answer, *example.candidates} | ({other.answer} if other is not None else set())
    try:
        for answer in answers:
            answer_ids(model, answer, example.candidates)
    except NoFirstToken:
        return False
    return True


# ---- figures ------------------------------------------------------------------------------------------


def _best_heads(heads: AttentionHeads) -> dict[str, float]:
    """Score and depth of the best head of each kind, and the score of an even spread."""
    figures = {}
    for where, kinds, even in (("text", heads.text, heads.even_text), ("image", heads.image, heads.even_image)):
        for kind, scores in kinds.items():
            label = kind if kind.startswith("image") else f"{kind}, {where}"
            layer = int(scores.max(-1).values.argmax())
            figures[label] = float(scores.max())
            figures[f"{label}, even"] = even[kind]
            figures[f"{label}, depth"] = (layer + 0.5) / len(scores)
    return figures


def _crossing(curve: tuple[np.ndarray, np.ndarray] | None, falling: bool) -> float:
    """The first depth at which the mean recovery is at most (falling) or at least one half; NaN if never."""
    if curve is None:
        return float("nan")
    depths, values = curve
    crossed = np.flatnonzero(values <= 0.5 if falling else values >= 0.5)
    return float(depths[crossed[0]]) if len(crossed) else float("nan")


def _mean(values: Sequence[bool]) -> float:
    return float(np.mean(values)) if values else float("nan")
