"""Does switching off a domain's own neurons hurt that domain more than switching off other neurons?

1. Select the neurons on training images; answer questions about test images, none of which was used for the selection.
2. For each domain and each module (decoder, vision, projector, or all three), switch off the domain's own neurons. Two controls,
   for several seeds: as many random neurons of the same layers, and as many random neurons that also fire about as often in that
   domain (selection by firing prefers neurons that fire often). Controls contain no selected neuron.
3. Compare the whole greedy answer with the right one. Also measure the log-probability (nats) of the right answer's first
   token, which changes before answers do.
4. Intervals of 95 %: bootstrap over images (with all their questions) and seeds; differences are paired by question.
5. The same with neurons selected by effect: the first-order loss of the answer's log-probability when a neuron is set to 0,
   Σ_tokens a · ∂ log p(answer)/∂a, on the domain minus its mean over the other domains; as many neurons as firing selected.

Source: MMNeuron (Huo et al., EMNLP 2024); the controls, intervals and step 5 are ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.tools.analysis import logit_readout

from analyses.common.result import Result
from analyses.common.statistics import mean_interval, share_interval
from analyses.common.sums import Sums
from analyses.data.examples import Example, examples, image_key, in_batches
from analyses.domain_neurons import (
    SITES,
    TOKENS,
    DomainNeurons,
    Firings,
    disable_neurons,
    firing_terms,
    hook_sites,
    module_shape,
    token_sources,
)
from analyses.experiments.experiment import Data, Done, Experiment
from analyses.logit_lens import residual_stack
from hooked_qwen2vl.image_embeddings import ImageEmbeddingsCache
from hooked_qwen2vl.moved import moved_names, renamed_arguments
from hooked_qwen2vl.prompt_text import text_ids
from hooked_qwen2vl.protocols import Model

__getattr__ = moved_names(__name__)

ALL = "all"
NONE = "none"
FIRING, EFFECT = "firing", "effect"
RANDOM, RANDOM_RATE, RANDOM_EFFECT = "random", "random, same rate", "random for effect"
CONTROLS = {FIRING: (RANDOM, RANDOM_RATE), EFFECT: (RANDOM_EFFECT,)}
_OUTCOMES = ("selection", "module", "target", "seed", "neurons", "id", "image", "domain", "right", "log_prob")
_SPARE_TOKENS = 4  # tokens allowed beyond twice the right answer's length: a space, a full stop, the end token


# ---- counting ---------------------------------------------------------------------------------------


class FiringExperiment(Experiment):
    """The experiment: counts of firings, as terms of a sum (`firing_terms`)."""

    name = "neurons: firings"
    summed = by_domain = True

    def __init__(self, model: Model, generate: int = 0, modules: Sequence[str] | None = None):
        super().__init__(model, {"generate": generate, "modules": _listed(modules)})
        self.terms_of = firing_terms(model, generate, modules)

    def __call__(self, batch: Sequence[Example]) -> Iterator[dict[str, Any]]:
        return self.terms_of(batch)

    @staticmethod
    def result(done: Done) -> Firings:
        return Firings.from_sums(done.rows, done.model_name)


@renamed_arguments
def count_firings(
    model: Model,
    data: str | Path | Iterable[Example] = "scenes:train",
    limit: int | None = None,
    modules: Sequence[str] | None = None,
    batch_size: int = 8,
    generate: int = 0,
    progress: bool = True,
    *,
    out: str | Path | None = None,
    rank: tuple[int, int] | None = None,
) -> Firings | None:
    """The counts of `analyses.domain_neurons.count_firings`, which explains the arguments, also as a run in a folder.

    Args:
        out, rank: a run in a folder (see `Experiment.run`).
    Returns:
        the counts; None if `rank` is given and shards of other ranks are missing.
    """
    named = isinstance(data, (str, Path))
    stream = (lambda: examples(data, limit, "train")) if named else list(examples(data, limit))
    return FiringExperiment(model, generate, modules).run(stream, out, batch_size=batch_size, rank=rank, progress=progress)


def read_firings(out: str | Path) -> Firings:
    """Reads the counts from a folder that `count_firings` wrote, without the model.

    Raises:
        ValueError: no run there, one that is not finished, or nothing was counted.
    """
    return FiringExperiment.read(out)


def _listed(names: Sequence[str] | None) -> list[str] | None:
    return None if names is None else list(names)


# ---- test questions ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Test questions of one domain, encoded.

    Attributes:
        inputs: left-padded, with their image embeddings.
        ids, answers, images: of each row; rows with the same entry in `images` are about the same image.
        domain: of all rows.
    """

    inputs: Any
    ids: tuple[str, ...]
    answers: tuple[str, ...]
    images: tuple[str, ...]
    domain: str


@torch.no_grad()
def prepare(model: Model, data: Iterable[Example], batch_size: int = 32) -> list[Batch]:
    """Encodes every question once, batched by domain and length.

    Raises:
        ValueError: a question without a domain or an answer, or no question.
    """
    by_domain: dict[str, list[Example]] = {}
    for example in data:
        by_domain.setdefault(example.domain, []).append(example)
    if not by_domain:
        raise ValueError("there is no test question.")
    batches = []
    for some in by_domain.values():
        for batch in in_batches(sorted(some, key=lambda example: len(example.question)), batch_size):
            batches.append(_encoded(model, batch, model.encode))
    return batches


def _encoded(model: Model, some: Sequence[Example], encode: Callable[[Any], Any]) -> Batch:
    """Encodes questions of one domain as a batch."""
    for example in some:
        if example.domain in ("", ALL) or not example.answer:
            raise ValueError(f"example {example.id} needs an answer and a domain (not called {ALL!r}) to be judged by.")
    inputs = model.to_inputs([e.question for e in some], images=[list(e.images) for e in some])
    ids, answers = tuple(example.id for example in some), tuple(example.answer for example in some)
    return Batch(encode(inputs), ids, answers, tuple(map(image_key, some)), some[0].domain)


def answer(model: Model, batch: Batch) -> tuple[list[str | None], Float[np.ndarray, "row"]]:
    """(the model's greedy answers, log-probability (nats) of the first token of each right answer).

    An answer that does not end within twice the right answer's length plus 4 tokens is None, and counts as wrong.
    """
    first_logits: list[Tensor] = []

    def listen(tokens: Tensor, logits: Tensor) -> Tensor:
        if not first_logits:
            first_logits.append(logits)
        return torch.zeros(len(tokens), dtype=torch.bool)

    wanted = [torch.tensor(text_ids(model.tokenizer, text)) for text in batch.answers]
    limits = [2 * len(tokens) + _SPARE_TOKENS for tokens in wanted]  # per row: the rest of its batch does not matter
    done = model.generate(
        batch.inputs, max_new_tokens=max(limits), do_sample=False, return_type="tokens", stopping_criteria=listen, verbose=False
    )
    said = done[:, batch.inputs.shape[1] :].tolist()
    log_probs = first_logits[0].float().log_softmax(-1).cpu()
    at = torch.tensor([int(tokens[0]) for tokens in wanted])
    texts = [_until_end(model, ids[:limit]) for ids, limit in zip(said, limits)]
    return texts, log_probs.gather(-1, at[:, None])[:, 0].numpy()


def _until_end(model: Model, ids: Sequence[int]) -> str | None:
    """The text before the end token; None without one."""
    length = next((place for place, token in enumerate(ids) if token in model.cfg.special.eos), None)
    return None if length is None else model.tokenizer.decode(ids[:length], skip_special_tokens=True)


def same_answer(said: str, answer: str) -> bool:
    """Whether two answers are equal, apart from case, spaces around them, and a final full stop."""
    return said.strip().rstrip(".").strip().casefold() == answer.strip().rstrip(".").strip().casefold()


# ---- what is switched off ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """One set of neurons to switch off.

    Attributes:
        selection: "none", "firing", "effect", or a control.
        module: "decoder", "vision", "projector", "deepstack" or "all".
        target: the domain whose neurons these are, or for which they are a control.
        seed: of a control.
        masks: module -> [layer neuron].
    """

    selection: str
    module: str
    target: str
    seed: int
    masks: Mapping[str, Bool[Tensor, "layer neuron"]]

    @property
    def n_neurons(self) -> int:
        return sum(int(mask.sum()) for mask in self.masks.values())


def conditions(
    neurons: DomainNeurons, effects: Mapping[str, Float[Tensor, "domain layer neuron"]] | None = None, seeds: int = 3
) -> list[Condition]:
    """All sets of neurons that the experiment switches off, including controls.

    Args:
        effects: from `ablation_effects`, with the domains in the order of `neurons`; None: no selection by effect.
        seeds: number of draws of each control.
    """
    found = []
    modules = list(neurons.modules)
    for number, domain in enumerate(neurons.domains):
        sets = {(FIRING, 0): neurons.masks(domain)}
        for seed in range(seeds):
            rng = np.random.default_rng([seed, number])
            drawn = {(RANDOM, seed): {}, (RANDOM_RATE, seed): {}}
            for module, selection in neurons.modules.items():
                mask, barred = sets[FIRING, 0][module], selection.selected
                drawn[RANDOM, seed][module] = random_like(mask, barred, rng)
                drawn[RANDOM_RATE, seed][module] = random_like(mask, barred, rng, selection.rates[..., number])
            sets |= drawn
        if effects is not None:
            chosen = {m: strongest(effects[m], number, int(sets[FIRING, 0][m].sum())) for m in modules}
            sets[EFFECT, 0] = chosen
            for seed in range(seeds):
                rng = np.random.default_rng([seed, number, 1])
                sets[RANDOM_EFFECT, seed] = {m: random_like(mask, mask, rng) for m, mask in chosen.items()}
        for (selection, seed), masks in sets.items():
            found += [Condition(selection, module, domain, seed, {module: masks[module]}) for module in modules]
            if len(modules) > 1:
                found.append(Condition(selection, ALL, domain, seed, masks))
    return found


def random_like(
    mask: Bool[Tensor, "layer neuron"],
    barred: Bool[Tensor, "layer neuron"],
    rng: np.random.Generator,
    rates: Float[Tensor, "layer neuron"] | None = None,
    neighbours: int = 10,
) -> Bool[Tensor, "layer neuron"]:
    """Random neurons, as many in each layer as in `mask`, without those of `mask` and `barred`.

    Args:
        rates: also match these: each neuron is replaced by one of the `neighbours` neurons with the closest rates.
    Raises:
        ValueError: a layer has too few other neurons.
    """
    drawn = torch.zeros_like(mask)
    for layer, row in enumerate(mask):
        wanted, free = row.nonzero().flatten().numpy(), (~(barred[layer] | row)).nonzero().flatten().numpy()
        if len(free) < len(wanted):
            raise ValueError(f"layer {layer} has {len(free)} other neurons, {len(wanted)} are wanted for a control.")
        for neuron in rng.permutation(wanted):
            near = free
            if rates is not None:
                values = rates[layer].numpy()
                near = free[np.argsort(abs(values[free] - values[neuron]), kind="stable")[:neighbours]]
            chosen = rng.choice(near)
            drawn[layer, chosen] = True
            free = free[free != chosen]
    return drawn


class EffectExperiment(Experiment):
    """The experiment: first-order effects of neurons, as terms of a sum. An item without an image counts as 0 for the tower.

    Raises:
        ValueError: a module that the model does not have; when called: an example without a domain or an answer.
    """

    name = "neurons: effects"
    summed = by_domain = gradients = True

    def __init__(self, model: Model, modules: Sequence[str] | None = None):
        super().__init__(model, {"modules": _listed(modules)})
        self.sites = hook_sites(model, "hook_post", modules)
        self.widths = {module: module_shape(model, module)[1] for module in {module for module, _ in self.sites.values()}}

    def __call__(self, batch: Sequence[Example]) -> Iterator[dict[str, Any]]:
        if lacking := [example.id for example in batch if not example.domain or not example.answer]:
            raise ValueError(f"example {lacking[0]} needs a domain and an answer.")
        inputs = self.model.to_inputs(
            [e.question for e in batch], images=[list(e.images) for e in batch], answers=[e.answer for e in batch]
        )
        first = {example.domain: example.id for example in reversed(batch)}
        domains = list(first)
        of_row = torch.tensor([domains.index(example.domain) for example in batch])
        counts = of_row.bincount(minlength=len(domains)).tolist()
        effects = _first_order(self.model, inputs, self.sites)
        for module, layer in self.sites.values():
            total = torch.zeros(len(domains), self.widths[module], dtype=torch.float64)
            if (module, layer) in effects:  # without images the tower does not run
                of_token = of_row.repeat_interleave(inputs.shape[1]) if module == "decoder" else _of_tower(inputs, of_row, module)
                total.index_add_(0, of_token, effects[module, layer].cpu().double())
            for domain, n, values in zip(domains, counts, total.numpy()):
                yield {"id": first[domain], "domain": domain, "source": "", "module": module, "layer": layer, "n": n, "values": values}

    @staticmethod
    def result(done: Done, domains: Sequence[str]) -> dict[str, Tensor]:
        return _effects(done.rows, domains)


@renamed_arguments
def ablation_effects(
    model: Model,
    data: Data,
    domains: Sequence[str],
    modules: Sequence[str] | None = None,
    batch_size: int = 16,
    *,
    out: str | Path | None = None,
    rank: tuple[int, int] | None = None,
) -> dict[str, Float[Tensor, "domain layer neuron"]] | None:
    """First-order loss of log p(answer), in nats, when a neuron is set to 0: the mean over a domain's items of Σ_tokens a·∂log p/∂a.

    The whole answer is teacher-forced, without its end token. Positive: the neuron helps the domain's answers. An item
    without an image counts as 0 in the means for tower and projector.

    Args:
        domains: names, in the order of the result's domain axis.
        out, rank: a run in a folder (see `Experiment.run`).
    Returns:
        module -> effects; None if `rank` is given and shards of other ranks are missing.
    Raises:
        ValueError: an item of another domain or without an answer, or a domain without items.
    """
    experiment = EffectExperiment(model, modules)
    return experiment.run(data, out, batch_size=batch_size, rank=rank, progress=False, domains=domains)


def read_effects(out: str | Path, domains: Sequence[str]) -> dict[str, Float[Tensor, "domain layer neuron"]]:
    """Reads the effects from a folder that `ablation_effects` wrote, without the model.

    Raises:
        ValueError: no run there, one that is not finished, or as `ablation_effects`.
    """
    return EffectExperiment.read(out, domains=domains)


def _effects(sums: Sums, domains: Sequence[str]) -> dict[str, Tensor]:
    seen = {domain for domain, *_ in sums}
    if seen != set(domains):
        raise ValueError(f"the items to attribute are of the domains {', '.join(sorted(seen))}, expected {', '.join(domains)}.")
    shapes: dict[str, tuple[int, int, int]] = {}
    for (*_, module, layer), (_, values) in sums.items():
        shapes[module] = len(domains), max(layer + 1, shapes.get(module, (0, 0))[1]), len(values)
    effects = {module: torch.zeros(shapes[module], dtype=torch.float64) for module in SITES if module in shapes}
    for (domain, _, module, layer), (n, values) in sums.items():
        effects[module][domains.index(domain), layer] = torch.as_tensor(values) / int(n)
    return effects


def _first_order(model: Model, inputs: Any, sites: Mapping[str, tuple[str, int]]) -> dict[tuple[str, int], Tensor]:
    """(module, layer) -> [token neuron], activation times the gradient of the rows' summed log p(answer)."""
    kept: dict[tuple[str, int], Tensor] = {}

    def keep(post: Tensor, hook: Any) -> None:
        kept[sites[hook.name]] = post

    with torch.enable_grad():
        losses = model.run_with_hooks(inputs, return_type="loss", loss_per_token=True, fwd_hooks=[(name, keep) for name in sites])
        gradients = torch.autograd.grad(-losses.sum(), list(kept.values()))
    return {site: (a.detach() * g).flatten(0, -2) for (site, a), g in zip(kept.items(), gradients)}


def _of_tower(inputs: Any, of_row: Tensor, module: str) -> Tensor:
    sizes = torch.tensor([getattr(visual, TOKENS[module]) for visual in inputs.visuals])
    return of_row[[visual.row for visual in inputs.visuals]].repeat_interleave(sizes)


def strongest(effects: Float[Tensor, "domain layer neuron"], domain: int, n: int) -> Bool[Tensor, "layer neuron"]:
    """The n neurons whose effect on this domain exceeds their mean effect on the others the most."""
    others = [k for k in range(len(effects)) if k != domain]
    contrast = (effects[domain] - effects[others].mean(0)).flatten()
    mask = torch.zeros_like(contrast, dtype=torch.bool)
    mask[contrast.argsort(descending=True, stable=True)[:n]] = True
    return mask.view_as(effects[domain])


# ---- the experiment ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ablations(Result):
    """Whether each question was answered right, under every condition.

    Attributes:
        outcomes: one row per condition and question: selection, module, target (domain of the neurons), seed, neurons (number
            switched off), id, image, domain (of the question), right, log_prob (nats, of the right answer's first token).
        model_name: name of the model.
    """

    outcomes: pd.DataFrame
    model_name: str

    def accuracy(self) -> pd.DataFrame:
        """One row per selection, module and domain: accuracy on the domain when its own neurons (or their control) are off.

        And its change from the run with nothing off. Intervals resample images and seeds, whose numbers are given. Domain "all"
        pools the questions of all domains, each with the neurons of its own domain off.
        """
        base = self._base()
        rows = []
        own = self._own()
        for (selection, module), group in own.groupby(["selection", "module"], sort=False):
            for domain, some in _with_pool(group):
                right = _by_seed(some, "right")
                accuracy, low, high = share_interval(right.to_numpy(), right.index.get_level_values("image"))
                row = {"selection": selection, "module": module, "domain": domain, "items": len(right),
                       "images": some["image"].nunique(), "seeds": right.shape[1],
                       "neurons": some.groupby("target")["neurons"].mean().mean(), "accuracy": accuracy, "low": low, "high": high}  # fmt: skip
                if selection != NONE:
                    row |= _difference(some, base, "right", "change") | _difference(some, base, "log_prob", "log_prob_change")
                rows.append(row)
        return pd.DataFrame(rows)

    def against_controls(self) -> pd.DataFrame:
        """One row per selection, control, module and domain: `excess` = accuracy(own neurons off) − accuracy(control off).

        Below 0, the domain needs its own neurons more than the control's. `excess_log_prob` is the same for the log-probability.
        Intervals: bootstrap over images and seeds, paired by question.
        """
        own = self._own()
        rows = []
        for selection, controls in CONTROLS.items():
            chosen = own[own["selection"] == selection]
            for control in controls:
                drawn = own[own["selection"] == control]
                for module, group in drawn.groupby("module", sort=False):
                    mine = chosen[chosen["module"] == module]
                    for domain, some in _with_pool(group):
                        excess = _difference(some, mine, "right", "excess", -1)
                        excess |= _difference(some, mine, "log_prob", "excess_log_prob", -1)
                        n_neurons = some.groupby("target")["neurons"].mean().mean()
                        rows.append({"selection": selection, "control": control, "module": module, "domain": domain,
                                     "items": some["id"].nunique(), "neurons": n_neurons} | excess)  # fmt: skip
        return pd.DataFrame(rows)

    def cross(self, selection: str = FIRING, module: str = ALL) -> pd.DataFrame:
        """Change of accuracy from nothing off; rows: the domain whose neurons are off, columns: the domain of the questions.

        Raises:
            ValueError: that selection was run on its own domain only.
        """
        some = self.outcomes.query("selection == @selection and module == @module")
        if set(some["domain"]) != set(self._base()["domain"]) or (some["target"] == some["domain"]).all():
            raise ValueError(f"{selection!r} ({module}) was judged on its own domain only: there is no cross table.")
        merged = some.merge(self._base()[["id", "right"]], on="id", suffixes=("", "_none"))
        change = merged["right"].astype(float) - merged["right_none"].astype(float)
        table = change.groupby([merged["target"], merged["domain"]], sort=False).mean().unstack()
        domains = [domain for domain in table.index if domain in table.columns]
        return table.loc[domains, domains]

    def plot(self, path: Any = None) -> Any:
        """Accuracy as a matrix: what is switched off × domain of the questions."""
        from analyses.views.neurons import accuracy_plot

        return accuracy_plot(self.accuracy(), self.model_name, path)

    def plot_controls(self, path: Any = None) -> Any:
        """The domains' own neurons compared with their controls, with intervals."""
        from analyses.views.neurons import controls_plot

        return controls_plot(self.against_controls(), self.model_name, path)

    def to_dataframe(self) -> pd.DataFrame:
        return self.outcomes

    def _base(self) -> pd.DataFrame:
        return self.outcomes[self.outcomes["selection"] == NONE]

    def _own(self) -> pd.DataFrame:
        """Rows of questions of the domain whose neurons are off, and of the run with nothing off."""
        outcomes = self.outcomes
        return outcomes[(outcomes["target"] == outcomes["domain"]) | (outcomes["selection"] == NONE)]


class AblationExperiment(Experiment):
    """The experiment: one row per question and condition. Batches of one domain need the fewest forwards."""

    name = "neurons: ablations"
    by_domain = True
    batches_per_shard = 1  # a question is answered under every condition

    def __init__(self, model: Model, wanted: Sequence[Condition], crossed: Sequence[str] = (FIRING,)):
        super().__init__(model, {"conditions": _digest(wanted), "crossed": list(crossed)})
        self.wanted, self.crossed, self.encode = wanted, crossed, ImageEmbeddingsCache(model)

    @torch.no_grad()
    def __call__(self, batch: Sequence[Example]) -> list[dict[str, Any]]:
        by_domain = [[e for e in batch if e.domain == domain] for domain in dict.fromkeys(e.domain for e in batch)]
        encoded = [_encoded(self.model, some, self.encode) for some in by_domain]
        rows = [row for some in encoded for row in _under_all(self.model, some, self.wanted, self.crossed)]
        places = {example.id: place for place, example in enumerate(batch)}
        return sorted(rows, key=lambda row: places[row["id"]])

    @staticmethod
    def result(done: Done) -> Ablations:
        if done.rows.empty:
            raise ValueError("there is no test question, or none could be answered.")
        return Ablations(done.rows[list(_OUTCOMES)], done.model_name)


@renamed_arguments
@torch.no_grad()
def ablate(
    model: Model,
    data: Sequence[Batch] | Data,
    wanted: Sequence[Condition],
    crossed: Sequence[str] = (FIRING,),
    progress: bool = True,
    *,
    out: str | Path | None = None,
    batch_size: int = 16,
    rank: tuple[int, int] | None = None,
) -> Ablations | None:
    """Answers every question with nothing off, and the questions of each condition's domain with its neurons off.

    Args:
        data: questions, or the batches that `prepare` made of them.
        wanted: the conditions.
        crossed: selections that are also run on the questions of other domains, with all modules off together.
        out, batch_size, rank: a run in a folder (see `Experiment.run`).
    Returns:
        the outcomes; None if `rank` is given and shards of other ranks are missing.
    Raises:
        ValueError: prepared batches with `out`, or as `prepare`.
    """
    if not isinstance(data, Sequence) or not all(isinstance(batch, Batch) for batch in data):
        experiment = AblationExperiment(model, wanted, crossed)
        return experiment.run(cast(Any, data), out, batch_size=batch_size, rank=rank, progress=progress)
    if out is not None or rank is not None:
        raise ValueError("a run in a folder opens and encodes the questions itself: pass examples, not what prepare made of them.")
    bar = tqdm(data, desc="ablating", unit="batch", disable=not progress, delay=2)
    rows = [row for batch in bar for row in _under_all(model, cast(Any, batch), wanted, crossed)]
    return Ablations(pd.DataFrame(rows), str(model.cfg.model_name))


def read_ablations(out: str | Path) -> Ablations:
    """Reads the outcomes from a folder that `ablate` wrote, without the model.

    Raises:
        ValueError: no run there, one that is not finished, or one in which nothing could be answered.
    """
    return AblationExperiment.read(out)


def _digest(wanted: Sequence[Condition]) -> str:
    """A hash of the conditions and all their neurons."""
    hashed = hashlib.sha256()
    for condition in wanted:
        hashed.update(f"{condition.selection} {condition.module} {condition.target} {condition.seed}".encode())
        for module, mask in condition.masks.items():
            hashed.update(module.encode() + mask.numpy().tobytes())
    return hashed.hexdigest()[:16]


def _under_all(model: Model, batch: Batch, wanted: Sequence[Condition], crossed: Sequence[str]) -> list[dict]:
    """One batch's rows with nothing off, and under each condition that applies to its domain."""
    widest = ALL if any(condition.module == ALL for condition in wanted) else None
    untouched = _outcomes(model, batch)
    rows = _rows(Condition(NONE, ALL, "", 0, {}), batch, untouched)
    for condition in wanted:
        if batch.domain == condition.target or (condition.selection in crossed and widest in (None, condition.module)):
            if condition.n_neurons:
                with disable_neurons(model, condition.masks):
                    rows += _rows(condition, batch, _outcomes(model, batch))
            else:
                rows += _rows(condition, batch, untouched)  # nothing is off
    return rows


def _outcomes(model: Model, batch: Batch) -> list[tuple[bool, float]]:
    texts, log_probs = answer(model, batch)
    return [
        (text is not None and same_answer(text, right), float(log_prob)) for text, right, log_prob in zip(texts, batch.answers, log_probs)
    ]


def _rows(condition: Condition, batch: Batch, outcomes: Sequence[tuple[bool, float]]) -> list[dict]:
    about = {"selection": condition.selection, "module": condition.module, "target": condition.target,
             "seed": condition.seed, "neurons": condition.n_neurons}  # fmt: skip
    return [
        about | {"id": name, "image": image, "domain": batch.domain, "right": right, "log_prob": log_prob}
        for name, image, (right, log_prob) in zip(batch.ids, batch.images, outcomes)
    ]


def _difference(some: pd.DataFrame, base: pd.DataFrame, column: str, name: str, sign: int = 1) -> dict[str, float]:
    """Mean of `some` − `base` (times the sign) and its interval, paired by question."""
    table = _by_seed(some, column)
    reference = base.set_index("id")[column].astype(float).reindex(table.index.get_level_values("id"))
    differences = sign * (table.to_numpy() - reference.to_numpy()[:, None]) + 0.0  # no minus zero
    mean, low, high = mean_interval(differences, table.index.get_level_values("image"))
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def _by_seed(some: pd.DataFrame, column: str) -> pd.DataFrame:
    """A column as a table: rows (id, image), columns seed."""
    return some.pivot(index=["id", "image"], columns="seed", values=column).astype(float)


def _with_pool(group: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(name, rows) of each domain, then of all domains together."""
    return [*group.groupby("domain", sort=False), (ALL, group)]


# ---- the stream -------------------------------------------------------------------------------------


@torch.no_grad()
def stream_by_layer(model: Model, batches: Sequence[Batch], wanted: Sequence[Condition] = (), progress: bool = True) -> pd.DataFrame:
    """How far ablation moves the residual stream, and the logit lens's entropy, by layer and kind of token.

    Args:
        wanted: conditions, each run on the questions of its own domain; the run with nothing off comes first.
    Returns:
        one row per condition (selection, module, target, seed), domain, layer (0 = embeddings, n_layers = output) and
        source (image, text, last: the position that predicts the answer): `deviation`, mean of ‖h' − h‖ / ‖h‖, and
        `entropy_nats`, mean of the lens's entropy.
    """
    rows = []
    for batch in tqdm(batches, desc="reading streams", unit="batch", disable=not progress, delay=2):
        sources = _stream_sources(batch.inputs)
        untouched, _ = residual_stack(model, batch.inputs)
        for condition in [Condition(NONE, ALL, batch.domain, 0, {}), *(c for c in wanted if c.target == batch.domain)]:
            stack = untouched
            if condition.n_neurons:
                with disable_neurons(model, condition.masks):
                    stack, _ = residual_stack(model, batch.inputs)
            deviation = (stack.float() - untouched.float()).norm(dim=-1) / untouched.float().norm(dim=-1)
            for layer, (moved, vectors) in enumerate(zip(deviation.cpu(), stack)):
                for source, here in sources.items():
                    entropy = logit_readout(model, vectors[here.to(vectors.device)], return_type="log_probs", chunk_size=64).entropy
                    rows.append(
                        {"selection": condition.selection, "module": condition.module, "target": condition.target,
                         "seed": condition.seed, "domain": batch.domain, "layer": layer, "source": source,
                         "tokens": int(here.sum()), "deviation": float(moved[here].sum()), "entropy_nats": float(entropy.sum())}
                    )  # fmt: skip
    keys = ["selection", "module", "target", "seed", "domain", "layer", "source"]
    table = pd.DataFrame(rows).groupby(keys, sort=False).sum().reset_index()
    for column in ("deviation", "entropy_nats"):
        table[column] /= table["tokens"]
    return table


def _stream_sources(inputs: Any) -> dict[str, Bool[Tensor, "batch pos"]]:
    sources = token_sources(inputs)
    last = torch.zeros_like(sources, dtype=torch.bool)
    for row in range(len(inputs)):
        last[row, inputs.positions("last", row)] = True
    found = {"image": sources == 0, "text": sources == 1, "last": last}
    return {name: here for name, here in found.items() if here.any()}


def split_by_image(data: Iterable[Example]) -> tuple[list[Example], list[Example]]:
    """(selection, test): the images of each domain alternate between the two, with all their questions; no image is in both.

    Raises:
        ValueError: a domain has only one image.
    """
    halves: tuple[list[Example], list[Example]] = ([], [])
    side: dict[str, int] = {}
    n_images: dict[str, int] = {}
    for example in data:
        key = image_key(example)
        if key not in side:
            side[key] = n_images.get(example.domain, 0) % 2
            n_images[example.domain] = n_images.get(example.domain, 0) + 1
        halves[side[key]].append(example)
    single = [domain for domain, n in n_images.items() if n < 2]
    if single:
        raise ValueError(f"{', '.join(single)} has one image only: there must be one to select on and another to test.")
    return halves
