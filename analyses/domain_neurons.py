"""Domain-specific neurons: which neurons fire mostly in one visual domain? (MMNeuron, Huo et al., EMNLP 2024)

1. Run every example of every domain. A neuron fires at a token where its activation is above 0; count firings
   M[l, i, k] of neuron i of layer l and tokens N[k] of domain k, in constant memory.
2. p = M / N;  q = p / Σ_k p (0/0 is 0);  DAPE = −Σ_k q ln q, in nats, from 0 (one domain) to ln K (all K domains alike).
3. τ = the 95 % quantile of all p (one of the values, its rank rounded); a neuron whose p exceeds τ in no domain gets DAPE +∞.
4. S = the 1 % of neurons of lowest DAPE; a neuron of S belongs to the domains k with p[l, i, k] > τ.
5. Disable them: set their activations before W_out to 0 (or to their means), in the prompt and in decoding.

Each module is analysed by itself: the decoder's gate (`mlp.hook_pre`; silu(x) > 0 iff x > 0), the tower's MLP, the
projector and DeepStack's mergers (Qwen3-VL; layer k is the merger whose output is added after block k), all before their
activation functions (which keep the sign). A token is a position of the prompt in the decoder, a patch in the tower (14
pixels; 16 in Qwen3-VL) and an image token in projector and mergers; padding is not counted.
Our addition: image tokens, the prompt's text and the answer's tokens are counted separately, so that each can be analysed alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from analyses.common.result import Result
from analyses.common.sums import Sums, add_up
from analyses.data.examples import Example, examples, in_batches
from hooked_qwen2vl.image_embeddings import ImageEmbeddingsCache
from hooked_qwen2vl.moved import moved_names
from hooked_qwen2vl.protocols import Model

__getattr__ = moved_names(__name__)

SITES = {
    "decoder": "blocks.{}.mlp", "vision": "vision_encoder.blocks.{}.mlp", "projector": "vision_projector",
    "deepstack": "vision_projector.deepstack.{}",
}  # fmt: skip
# What counts the tokens of an image that a module of the vision half sees.
TOKENS = {"vision": "n_patches", "projector": "n_tokens", "deepstack": "n_tokens"}
SOURCES = ("image", "text", "generated")
_CHUNK = 2**17  # numbers compared at a time
Masks = Mapping[str, Bool[Tensor, "layer neuron"]]


# ---- selection: from firing rates alone -------------------------------------------------------------


def domain_entropy(rates: Float[Tensor, "layer neuron domain"]) -> Float[Tensor, "layer neuron"]:
    """DAPE in nats, before the filter: how evenly a neuron's firing is spread over the domains; 0 if it never fires.

    Source: MMNeuron, equation 3.
    """
    total = rates.sum(-1, keepdim=True)
    share = torch.where(total > 0, rates / total, 0.0)
    return torch.special.entr(share).sum(-1)


@dataclass(frozen=True)
class Selection(Result):
    """The domain-specific neurons of one module.

    Attributes:
        rates: [layer neuron domain] p, firings per token.
        dape: [layer neuron] nats; +inf for neurons that the filter (step 3) left out.
        belongs: [layer neuron domain] whether the neuron is selected and belongs to the domain.
        threshold: τ.
        wanted: how many neurons were to be selected; fewer are selected if the filter left fewer.
    """

    rates: Float[Tensor, "layer neuron domain"]
    dape: Float[Tensor, "layer neuron"]
    belongs: Bool[Tensor, "layer neuron domain"]
    threshold: float
    wanted: int

    @property
    def selected(self) -> Bool[Tensor, "layer neuron"]:
        """S, the selected neurons; each of them belongs to at least one domain."""
        return self.belongs.any(-1)


def select_neurons(rates: Float[Tensor, "layer neuron domain"], share: float = 0.01, quantile: float = 0.95) -> Selection:
    """Steps 2 to 4 of the method on one module's firing rates; ties go to the lower layer and neuron.

    Args:
        share: of the module's neurons, how many to select. quantile: of all rates, which is taken as τ.
    Raises:
        ValueError: share or quantile outside (0, 1), or fewer than two domains.
    """
    if not (0 < share < 1 and 0 < quantile < 1):
        raise ValueError(f"share and quantile must be between 0 and 1, got {share} and {quantile}.")
    if rates.shape[-1] < 2:
        raise ValueError(f"expected at least two domains to compare, got {rates.shape[-1]}.")
    flat = rates.double().flatten()
    threshold = flat.kthvalue(max(1, round(quantile * len(flat)))).values
    above = rates.double() > threshold
    dape = domain_entropy(rates.double()).masked_fill(~above.any(-1), math.inf)
    wanted = round(share * dape.numel())
    lowest = dape.flatten().argsort(stable=True)[:wanted]
    chosen = torch.zeros(dape.numel(), dtype=torch.bool)
    chosen[lowest] = True
    return Selection(rates, dape, above & chosen.view_as(dape)[..., None], float(threshold), wanted)


@dataclass(frozen=True)
class DomainNeurons(Result):
    """Which neurons belong to which domains.

    Attributes:
        modules: module -> its selection.
        domains: names, in the order of the domain axis.
        sources: which tokens were counted, of `SOURCES`.
        model_name: of the model.
    """

    modules: dict[str, Selection]
    domains: tuple[str, ...]
    sources: tuple[str, ...]
    model_name: str

    def masks(self, domain: str | None = None, modules: Sequence[str] | None = None) -> dict[str, Tensor]:
        """module -> [layer neuron], a mask of the neurons of a domain (None: of any domain), as `disable_neurons` takes it.

        Raises:
            ValueError: no such domain or module.
        """
        _known(domain, (None, *self.domains), "domain")
        found = {}
        for module in self.modules if modules is None else modules:
            _known(module, self.modules, "module")
            belongs = self.modules[module].belongs
            found[module] = belongs.any(-1) if domain is None else belongs[..., self.domains.index(domain)]
        return found

    def to_dataframe(self) -> pd.DataFrame:
        """One row per selected neuron: module, layer, neuron, DAPE (nats), its domains, its rate in each domain (0..1)."""
        rows = []
        for module, selection in self.modules.items():
            for layer, neuron in selection.selected.nonzero().tolist():
                serves = [d for d, yes in zip(self.domains, selection.belongs[layer, neuron].tolist()) if yes]
                rates = dict(zip((f"rate_{d}" for d in self.domains), selection.rates[layer, neuron].tolist()))
                dape = float(selection.dape[layer, neuron])
                rows.append({"module": module, "layer": layer, "neuron": neuron, "dape_nats": dape, "domains": " ".join(serves)} | rates)
        columns = ["module", "layer", "neuron", "dape_nats", "domains", *(f"rate_{d}" for d in self.domains)]
        return pd.DataFrame(rows, columns=columns)

    def by_layer(self) -> pd.DataFrame:
        """One row per module, layer and domain: how many neurons belong to the domain."""
        return pd.DataFrame(
            {"module": module, "layer": layer, "domain": domain, "neurons": count}
            for module, selection in self.modules.items()
            for layer, counts in enumerate(selection.belongs.sum(1).tolist())
            for domain, count in zip(self.domains, counts)
        )

    def overlaps(self) -> pd.DataFrame:
        """One row per module and pair of domains: how many neurons belong to both (a domain with itself: how many it has)."""
        rows = []
        for module, selection in self.modules.items():
            flat = selection.belongs.flatten(0, 1).long()
            for domain, counts in zip(self.domains, (flat.T @ flat).tolist()):
                rows += [
                    {"module": module, "domain": domain, "other": other, "neurons": count} for other, count in zip(self.domains, counts)
                ]
        return pd.DataFrame(rows)

    def plot(self, path: Any = None) -> Any:
        """Number of neurons by layer and domain, one panel for each module."""
        from analyses.views.neurons import layers_plot

        return layers_plot(self.by_layer(), self.model_name, path)


# ---- counts -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Firings(Result):
    """How often each neuron fired in each domain; neurons are selected from it without the model.

    Attributes:
        fired: module -> [domain source layer neuron] number of tokens at which the neuron fired.
        tokens: module -> [domain source] number of tokens counted.
        domains: names, in the order of the domain axis; sources are `SOURCES`.
        model_name: of the model.
    """

    fired: dict[str, Int[Tensor, "domain source layer neuron"]]
    tokens: dict[str, Int[Tensor, "domain source"]]
    domains: tuple[str, ...]
    model_name: str

    @classmethod
    def from_sums(cls, sums: Sums, model_name: str) -> Firings:
        """The counts from sums by domain, source, module and layer (`analyses.common.sums`); domains in alphabetical order.

        Raises:
            ValueError: nothing was counted.
        """
        if not sums:
            raise ValueError("nothing was counted: each example needs a domain, and an image that can be read.")
        domains = tuple(sorted({domain for domain, *_ in sums}))
        fired: dict[str, Tensor] = {}
        tokens: dict[str, Tensor] = {}
        for module in SITES:
            own = {key: value for key, value in sums.items() if key[2] == module}
            if not own:
                continue  # without any image there is nothing to say of the tower
            n_layers, n_neurons = 1 + max(layer for *_, layer in own), len(next(iter(own.values()))[1])
            fired[module] = torch.zeros(len(domains), len(SOURCES), n_layers, n_neurons, dtype=torch.long)
            tokens[module] = torch.zeros(len(domains), len(SOURCES), dtype=torch.long)
            for (domain, source, _, layer), (n, values) in own.items():
                place = domains.index(domain), SOURCES.index(source)
                fired[module][*place, layer] = torch.as_tensor(values)
                tokens[module][place] = int(n)
        return cls(fired, tokens, domains, model_name)

    def rates(self, module: str, sources: Sequence[str] = SOURCES) -> Float[Tensor, "layer neuron domain"]:
        """p = M / N in float64, over the tokens of the named sources together.

        Raises:
            ValueError: no such module or source, or a domain without any such token.
        """
        _known(module, self.fired, "module")
        for source in sources:
            _known(source, SOURCES, "source")
        index = [SOURCES.index(source) for source in sources]
        fired, tokens = self.fired[module][:, index].sum(1), self.tokens[module][:, index].sum(1)
        empty = [domain for domain, n in zip(self.domains, tokens.tolist()) if not n]
        if empty:
            raise ValueError(f"{module}: no token of {'/'.join(sources)} was seen in {', '.join(empty)}.")
        return (fired.double() / tokens.double()[:, None, None]).permute(1, 2, 0)

    def select(
        self,
        share: float = 0.01,
        quantile: float = 0.95,
        sources: Sequence[str] = SOURCES,
        modules: Sequence[str] | None = None,
    ) -> DomainNeurons:
        """The domain-specific neurons of each module.

        Args:
            share, quantile: see `select_neurons`.
            sources: which tokens count; the vision half's modules see images only and are left out without "image".
            modules: None for all that were counted.
        Raises:
            ValueError: see `rates` and `select_neurons`.
        """  # fmt: skip
        chosen = {}
        for module in self.fired if modules is None else modules:
            heard = sources if module == "decoder" else [source for source in sources if source == "image"]
            if heard:
                chosen[module] = select_neurons(self.rates(module, heard), share, quantile)
        return DomainNeurons(chosen, self.domains, tuple(sources), self.model_name)


class FiringCounter:
    """Counts firings while a model runs, in memory that does not grow with the data.

    Attributes:
        domains: the domains seen so far, in order of appearance.
    """

    def __init__(self, model: Model, modules: Sequence[str] | None = None):
        self.sites = hook_sites(model, "hook_pre", modules)
        self.domains: list[str] = []
        self._ends = model.cfg.special.eos if hasattr(model.cfg, "special") else ()
        self._fired: dict[tuple[str, int], Int[Tensor, "group neuron"]] = {}
        self._tokens = {module: torch.zeros(0, dtype=torch.long) for module, _ in self.sites.values()}

    @torch.no_grad()
    def add(self, model: Model, inputs: Any, domains: Sequence[str]) -> None:
        """Runs the prompts and counts their firings.

        Args:
            inputs: `Inputs`, or token ids [batch pos] without padding for a model that takes nothing else.
            domains: the domain of each row.
        Raises:
            ValueError: the domains are not one for each row.
        """
        with self.counting(model, inputs, domains):
            model(inputs, return_type=None)

    @contextmanager
    def counting(self, model: Model, inputs: Any, domains: Sequence[str], modules: Sequence[str] | None = None) -> Iterator[None]:
        """Within this context, one forward of these prompts is counted; `modules`: in which modules, None for all."""
        codes = self._codes(inputs, domains)
        sites = {name: site for name, site in self.sites.items() if modules is None or site[0] in modules}
        groups = {module: codes[module].unique(return_inverse=True) for module, _ in sites.values()}
        for module, (present, group) in groups.items():
            self._tokens[module] = _grown(self._tokens[module], self._n_groups)
            self._tokens[module][present] += group.bincount(minlength=len(present))
        hooks = [(name, partial(self._count, site=site, groups=groups[site[0]])) for name, site in sites.items()]
        with model.hooks(fwd_hooks=hooks):
            yield

    def _codes(self, inputs: Any, domains: Sequence[str]) -> dict[str, Int[Tensor, "token"]]:
        """module -> the group of each of its tokens: 0 for tokens that are not counted, then one for each domain × source."""
        if len(domains) != len(inputs) or not all(domains):
            raise ValueError(f"expected a domain for each of {len(inputs)} rows, got {list(domains)}.")
        self.domains += [domain for domain in dict.fromkeys(domains) if domain not in self.domains]
        first = torch.tensor([1 + len(SOURCES) * self.domains.index(domain) for domain in domains])
        sources = token_sources(inputs, self._ends)
        codes = {"decoder": torch.where(sources < 0, 0, first[:, None] + sources).flatten()}
        visuals = getattr(inputs, "visuals", ())
        for module, size in TOKENS.items():
            sizes = torch.tensor([getattr(visual, size) for visual in visuals], dtype=torch.long)
            rows = torch.tensor([visual.row for visual in visuals], dtype=torch.long)
            codes[module] = first[rows].repeat_interleave(sizes)
        return codes

    def _count(self, pre: Float[Tensor, "batch pos neuron"], hook: Any, site: tuple[str, int], groups: Any) -> None:
        present, group = (tensor.to(pre.device) for tensor in groups)
        flat = pre.detach().flatten(0, -2)
        if len(flat) != len(group):
            raise ValueError(f"{hook.name} has {len(flat)} tokens, the prompts have {len(group)}: count one forward.")
        # Comparison and sum are in float32, which is fast, and exact below 2²⁴. They take a few tokens at a time, so that
        # these stay in the processor's cache.
        n_neurons = flat.shape[1]
        step = len(flat) if flat.is_cuda else max(1, _CHUNK // n_neurons)
        sums, buffer = (torch.zeros(n, n_neurons, device=flat.device) for n in (len(present), min(step, len(flat))))
        for some, where in zip(flat.split(step), group.split(step)):
            sums.index_add_(0, where, torch.gt(some, 0, out=buffer[: len(some)]))
        total = self._fired.get(site)
        total = torch.zeros(0, n_neurons, dtype=torch.long, device=flat.device) if total is None else total
        self._fired[site] = total = _grown(total, self._n_groups)
        total[present] += sums.long()

    def terms(self) -> Iterator[dict[str, Any]]:
        """The counts so far, one term for each domain, source, module and layer, to be added up by `analyses.common.sums`."""
        for (module, layer), fired in self._fired.items():
            counts, tokens = self._counted(fired).cpu().numpy(), self._counted(self._tokens[module]).tolist()
            for group, n in enumerate(tokens):
                if n:
                    domain, source = self.domains[group // len(SOURCES)], SOURCES[group % len(SOURCES)]
                    yield {"domain": domain, "source": source, "module": module, "layer": layer, "n": n, "values": counts[group]}

    def result(self, model_name: str) -> Firings:
        """The counts so far."""
        return Firings.from_sums(add_up(self.terms()), model_name)

    @property
    def _n_groups(self) -> int:
        """Number of groups: one for tokens that are not counted, then domains × sources."""
        return 1 + len(SOURCES) * len(self.domains)

    def _counted(self, counts: Int[Tensor, "group *rest"]) -> Int[Tensor, "group *rest"]:
        return _grown(counts, self._n_groups)[1:]


def firing_terms(
    model: Model, generate: int = 0, modules: Sequence[str] | None = None
) -> Callable[[Sequence[Example]], Iterator[dict[str, Any]]]:
    """A function from a batch of examples to its counts as terms (`FiringCounter.terms`), each with the id of an example of its domain.

    The tower runs once for each image, also if several questions are about it; the image's tokens count once for each question.

    Args:
        generate, modules: see `count_firings`.
    Raises:
        ValueError: a module that the model does not have; (when called) an example without a domain.
    """
    present = {module for module, _ in hook_sites(model, "hook_pre", modules).values()}
    tower = [module for module in TOKENS if module in present]
    embeddings = ImageEmbeddingsCache(model, watch=partial(_tower_firings, model, tower))

    @torch.no_grad()
    def terms_of(batch: Sequence[Example]) -> Iterator[dict[str, Any]]:
        if nameless := [example.id for example in batch if not example.domain]:
            raise ValueError(f"example {nameless[0]} has no domain: name one in its line, or put it in a folder of that name.")
        inputs, seen = embeddings.watched(model.to_inputs([e.question for e in batch], images=[list(e.images) for e in batch]))
        terms = list(_decoder_terms(model, inputs, [e.domain for e in batch], generate)) if "decoder" in present else []
        for visual, counts in zip(inputs.visuals, seen):
            about = {"domain": batch[visual.row].domain, "source": "image"}
            terms += [
                {**about, "module": module, "layer": layer, "n": getattr(visual, TOKENS[module]), "values": values}
                for module, layers in zip(tower, counts)
                for layer, values in enumerate(layers.numpy())
            ]
        first = {example.domain: example.id for example in reversed(batch)}
        return ({"id": first[term["domain"]], **term} for term in terms)

    return terms_of


def _decoder_terms(model: Model, inputs: Any, domains: Sequence[str], generate: int) -> Iterator[dict[str, Any]]:
    """The decoder's counts, in one forward of the prompt; with `generate`, an answer is generated first and counted too."""
    if generate:
        inputs = model.generate(inputs, max_new_tokens=generate, do_sample=False, return_type="inputs", verbose=False)
    counter = FiringCounter(model, ["decoder"])
    counter.add(model, inputs, domains)
    return counter.terms()


@contextmanager
def _tower_firings(model: Model, modules: Sequence[str], inputs: Any) -> Iterator[list[Int[Tensor, "layer neuron"]]]:
    """Within this context one image is encoded; afterwards the list holds its firings [layer neuron] in each module."""
    found: list[Tensor] = []
    if not modules:
        yield found
        return
    counter = FiringCounter(model, modules)
    with counter.counting(model, inputs, ["-"] * len(inputs)):
        yield found
    counts = counter.result("").fired
    found += [counts[module][0, SOURCES.index("image")] for module in modules]


def count_firings(
    model: Model,
    data: str | Path | Iterable[Example] = "scenes:train",
    limit: int | None = None,
    modules: Sequence[str] | None = None,
    batch_size: int = 8,
    generate: int = 0,
    progress: bool = True,
) -> Firings:
    """Runs a data set through the model and counts firings by domain, in memory.

    For thousands of examples, with results in a folder and runs that can be resumed: `analyses.experiments.neurons.count_firings`.

    Args:
        data: see `analyses.data.examples`, or the examples themselves.
        limit: largest number of examples, spread over the domains; a warning says how many are left out.
        modules: of "decoder", "vision", "projector"; None for all that the model has.
        generate: largest number of tokens of an answer that is generated greedily; the prompt with its answer is then
            counted in one forward, the answer (without its end token) as "generated". 0 counts the prompt only.
    Raises:
        ValueError: no example, an example without a domain, or a module that the model does not have.
    """
    bar = tqdm(examples(data, limit, "train"), desc="counting", unit="example", disable=not progress, delay=2)
    terms_of = firing_terms(model, generate, modules)
    sums = add_up(term for batch in in_batches(bar, batch_size) for term in terms_of(batch))
    return Firings.from_sums(sums, str(model.cfg.model_name))


def find_domain_neurons(
    model: Model,
    data: str | Path | Iterable[Example] = "scenes:train",
    limit: int | None = None,
    share: float = 0.01,
    quantile: float = 0.95,
    sources: Sequence[str] = SOURCES,
    **counting: Any,
) -> DomainNeurons:
    """The domain-specific neurons of a model: counts firings (`count_firings`), then selects (`Firings.select`).

    Args:
        data, limit, counting: see `count_firings`.
        share, quantile, sources: see `Firings.select`.
    """
    return count_firings(model, data, limit, **counting).select(share, quantile, sources)


# ---- disabling neurons ------------------------------------------------------------------------------


@contextmanager
def disable_neurons(
    model: Model, neurons: Masks | Iterable[tuple[str, int, int]], values: Mapping[str, Float[Tensor, "layer neuron"]] | None = None
) -> Iterator[None]:
    """Within this context the neurons' activations are 0: in plain runs, with a cache, and in generation.

    The activation before W_out (`hook_post`; in the decoder the product of gate and up) is set to 0, which has the same effect
    as setting the neuron's row of W_out to 0.

    Args:
        neurons: module -> [layer neuron] masks (`DomainNeurons.masks`), or (module, layer, neuron) triples.
        values: module -> [layer neuron], activations to set instead of 0 (such as `mean_activations`).
    Raises:
        ValueError: no such module, or a mask that has not the shape of the model's neurons.
    """
    chosen = _by_site(model, neurons)
    hooks = []
    for (module, layer), mask in chosen.items():
        value = 0.0 if values is None else values[module][layer]
        hooks.append((f"{SITES[module].format(layer)}.hook_post", partial(_replace, mask=mask, value=value)))
    with model.hooks(fwd_hooks=hooks):
        yield


def mean_activations(
    model: Model,
    data: str | Path | Iterable[Example] = "scenes:train",
    limit: int | None = None,
    modules: Sequence[str] | None = None,
    batch_size: int = 8,
) -> dict[str, Float[Tensor, "layer neuron"]]:
    """module -> [layer neuron] mean activation before W_out over all tokens of the prompts, in float32.

    Args:
        data, limit, modules, batch_size: see `count_firings`.
    """  # fmt: skip
    sites = hook_sites(model, "hook_post", modules)
    sums: dict[tuple[str, int], Tensor] = {}
    n_tokens = dict.fromkeys((module for module, _ in sites.values()), 0)
    for batch in in_batches(examples(data, limit, "train"), batch_size):
        inputs = model.to_inputs([e.question for e in batch], images=[list(e.images) for e in batch])
        real = inputs.attention_mask.flatten().bool()

        def add(post: Tensor, hook: Any) -> None:
            module, layer = site = sites[hook.name]
            flat = post.flatten(0, -2)[real.to(post.device) if module == "decoder" else slice(None)]
            wide = torch.float64 if flat.dtype == torch.float64 else torch.float32
            sums[site] = sums.get(site, 0) + flat.sum(0, dtype=wide).cpu().double()
            n_tokens[module] += len(flat) if layer == 0 else 0

        with torch.no_grad():
            model.run_with_hooks(inputs, return_type=None, fwd_hooks=[(name, add) for name in sites])
    if not sums:
        raise ValueError("there is no example to average over.")
    return {
        module: torch.stack([s for (m, _), s in sorted(sums.items(), key=lambda x: x[0][1]) if m == module]).float() / n
        for module, n in n_tokens.items()
        if n
    }


def _replace(post: Float[Tensor, "batch pos neuron"], hook: Any, mask: Bool[Tensor, "neuron"], value: Any) -> Tensor:
    if post.shape[-1] != len(mask):
        raise ValueError(f"{hook.name} has {post.shape[-1]} neurons, the mask {len(mask)}: it is another model's.")
    return torch.where(mask.to(post.device), torch.as_tensor(value, dtype=post.dtype, device=post.device), post)


def _by_site(model: Model, neurons: Any) -> dict[tuple[str, int], Bool[Tensor, "neuron"]]:
    """(module, layer) -> mask, for the layers with at least one neuron to disable."""
    depth: dict[str, int] = {}
    for module, layer in hook_sites(model, "hook_post").values():
        depth[module] = max(layer + 1, depth.get(module, 0))
    if not isinstance(neurons, Mapping):
        neurons = masks_of(model, neurons)
    for module, mask in neurons.items():
        _known(module, depth, "module")
        if mask.ndim != 2 or len(mask) != depth[module] or mask.dtype != torch.bool:
            raise ValueError(
                f"{module}: expected a boolean mask [layer neuron] of {depth[module]} layers, got {tuple(mask.shape)} of {mask.dtype}."
            )
    return {(module, layer): row for module, mask in neurons.items() for layer, row in enumerate(mask) if row.any()}


def masks_of(model: Model, neurons: Iterable[tuple[str, int, int]]) -> dict[str, Bool[Tensor, "layer neuron"]]:
    """(module, layer, neuron) triples as masks.

    Raises:
        ValueError: no such neuron.
    """
    masks: dict[str, Tensor] = {}
    for module, layer, neuron in neurons:
        _known(module, SITES, "module")
        if module not in masks:
            masks[module] = torch.zeros(module_shape(model, module), dtype=torch.bool)
        n_layers, n_neurons = masks[module].shape
        if not (0 <= layer < n_layers and 0 <= neuron < n_neurons):
            raise ValueError(f"{module} has {n_layers} layers of {n_neurons} neurons, there is no {(layer, neuron)}.")
        masks[module][layer, neuron] = True
    return masks


def module_shape(model: Model, module: str) -> tuple[int, int]:
    """(number of layers, neurons per layer) of a module."""
    names = list(hook_sites(model, "hook_post", [module]))
    return len(names), write_weights(model, module, 0).shape[0]


def write_weights(model: Model, module: str, layer: int) -> Float[Tensor, "neuron d"]:
    """W_out of a module's layer: neuron j adds row j times its activation to the output."""
    _known(module, SITES, "module")
    return model.get_submodule(SITES[module].format(layer)).W_out


# ---- tokens and sites -------------------------------------------------------------------------------


def hook_sites(model: Model, point: str, modules: Sequence[str] | None = None) -> dict[str, tuple[str, int]]:
    """hook name -> (module, layer), for the modules that this model has.

    Args:
        point: "hook_pre" or "hook_post". modules: None for all.
    Raises:
        ValueError: the model does not have one of the modules.
    """
    found: dict[str, tuple[str, int]] = {}
    for module, site in SITES.items():
        layer = 0
        while (name := f"{site.format(layer)}.{point}") in model.hook_dict and name not in found:
            found[name] = (module, layer)
            layer += 1
    for module in modules or ():
        _known(module, {m for m, _ in found.values()}, "module")
    return {name: site for name, site in found.items() if modules is None or site[0] in modules}


def token_sources(inputs: Any, ends: Sequence[int] = ()) -> Int[Tensor, "batch pos"]:
    """Index into `SOURCES` of each position; −1 for padding and for an answer's end token, which is not run in decoding.

    Args:
        ends: ids of the end tokens.
    """
    types = getattr(inputs, "token_types", None)
    if types is None:  # bare token ids
        return torch.full(inputs.shape, SOURCES.index("text"))
    sources = torch.where(types.cpu() > 0, SOURCES.index("image"), SOURCES.index("text"))
    if any("answer" in row for row in inputs.segments):
        answer = torch.tensor([[name == "answer" for name in row] for row in inputs.segments])
        sources[answer] = SOURCES.index("generated")
        sources[answer & torch.isin(inputs.tokens.cpu(), torch.tensor(list(ends), dtype=torch.long))] = -1
    sources[~inputs.attention_mask.bool().cpu()] = -1
    return sources


def _grown(counts: Int[Tensor, "group *rest"], n_groups: int) -> Int[Tensor, "group *rest"]:
    """The counts with rows of zeros added for new groups."""
    missing = n_groups - len(counts)
    return torch.cat((counts, counts.new_zeros(missing, *counts.shape[1:]))) if missing > 0 else counts


def _known(name: Any, names: Iterable[Any], what: str) -> None:
    if name not in names:
        raise ValueError(f"there is no {what} {name!r}; there are {', '.join(map(str, names))}.")
