"""Known mechanisms, planted in a model by editing its weights: the truth that methods for finding mechanisms are judged against.

    domain_neurons   decoder neurons that fire in the text after the image where the question is of one domain, and nowhere else. They
                     write what speaks for "none", so that the domain's answers suffer from them
    color_prior      six decoder neurons, one for each shape: where "What color is the heart?" is asked, one fires at the last
                     position and writes the heart's typical colour, whatever is in the picture
    copying_head     a head that looks, from the last position of "Is there a red heart?", at the colour in the question and writes
                     that colour as the answer

Neurons are planted by hand: a linear discriminant of the MLP's input becomes the neuron's gate and up weights, and the strength s in
0..1 scales what the neuron writes. The head is trained: its own query and output weights alone, for a few hundred steps, on questions
of the training split; s goes from its weights as they were to the trained ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..protocols import Model
from .scene import typical_color
from .words import ABSENT, COLORS, DOMAINS, SHAPES
from .world import Item, sample

N_NEURONS = 6
# Norm of what planted neurons write at full strength (those of a domain together, those of the prior each), as a share of the stream's.
_DOMAIN_WRITES, _PRIOR_WRITES = 1.0, 8.0
_RIDGE = 1e-2
_BATCH = 16


@dataclass(frozen=True)
class Planted:
    """A mechanism, and the weights that make it.

    Attributes:
        what: "domain neurons", "color prior" or "copying head".
        neurons: (layer, neuron) of the decoder. heads: (layer, head). One of the two is empty.
        about: the domain of the neurons, the shape of each neuron, or ().
        strength: s.
        weights: parameter -> (as it was, W_0, W_1); the mechanism of strength s has W_0 + s (W_1 − W_0).
    """

    what: str
    neurons: tuple[tuple[int, int], ...]
    heads: tuple[tuple[int, int], ...]
    about: tuple[str, ...]
    strength: float
    weights: Mapping[str, tuple[Tensor, Tensor, Tensor]]

    def at(self, strength: float) -> Planted:
        """The same mechanism at another strength.

        Raises:
            ValueError: not in 0..1.
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"a strength is in 0..1, from no effect to the full one; got {strength}.")
        return replace(self, strength=strength)

    @contextmanager
    def in_model(self, model: Model) -> Iterator[Any]:
        """The model with the mechanism in it; as it was afterwards.

        Raises:
            ValueError: another model than that in which it was planted, or one whose weights there have been changed since.
        """
        parameters = dict(model.named_parameters())
        for name, (before, _, _) in self.weights.items():
            if name not in parameters or not torch.equal(parameters[name], before.to(parameters[name].device)):
                raise ValueError(
                    f"the {self.what} was planted in a model with other weights at {name}: plant it in this model, and one mechanism at a "
                    f"time where two change the same weights."
                )
        with torch.no_grad():
            for name, (_, none, full) in self.weights.items():
                parameters[name].copy_(none + self.strength * (full - none))
        try:
            yield model
        finally:
            with torch.no_grad():
                for name, (before, _, _) in self.weights.items():
                    parameters[name].copy_(before)


def domain_neurons(model: Model, domain: str, seed: int = 0, n: int = N_NEURONS, n_items: int = 250) -> Planted:
    """n random neurons of one block in the middle half of the decoder. Each is fitted to another half of the questions, so that no two
    are alike; in one block, so that none reads what another writes.

    Args:
        n_items: questions of the training split to which the gates are fitted.
    Raises:
        ValueError: no such domain.
    """
    if domain not in DOMAINS:
        raise ValueError(f"expected a domain of {', '.join(DOMAINS)}, got {domain!r}.")
    n_layers, rng = model.cfg.n_layers, Random(f"{seed} {domain}")
    layer = rng.choice(range(n_layers // 4, n_layers - n_layers // 4))
    neurons = rng.sample(range(model.cfg.d_mlp), n)
    items = sample(n_items, seed=seed + 1, split="train")

    def seen(inputs: Any, row: int) -> Tensor:  # nobody can know the domain before the image, nor at an empty part of it
        return torch.arange(int(inputs.positions("image", row)[-1]) + 1, inputs.shape[1])

    writes, weights = model.W_U[:, _token(model, ABSENT)], _Edits(model)
    read = _mlp_inputs(model, layer, items, seen)
    for neuron in neurons:
        half = rng.sample(range(len(items)), len(items) // 2)
        yes, no = (torch.cat([read[k] for k in half if (items[k].domain == domain) == own]) for own in (True, False))
        weights.plant_neuron(layer, neuron, _discriminant(yes, no), yes, writes, _DOMAIN_WRITES / n)
    return Planted("domain neurons", tuple((layer, neuron) for neuron in neurons), (), (domain,), 1.0, weights.done())


def color_prior(model: Model, seed: int = 0, n_items: int = 300) -> Planted:
    """A neuron for each shape, in the block at five eighths of the depth, that writes its typical colour where its colour is asked."""
    layer, rng = 5 * model.cfg.n_layers // 8, Random(seed)
    neurons = rng.sample(range(model.cfg.d_mlp), len(SHAPES))
    items = sample(n_items, seed=seed + 1, split="train", domain="shapes", category="attribute")
    items += sample(n_items // 2, seed=seed + 2, split="train")

    def answered(inputs: Any, row: int) -> Tensor:  # where the answer is decided, and where it stands: there no neuron may fire
        first = int(inputs.positions("answer", row)[0])
        return torch.tensor([first - 1, first])

    weights, read = _Edits(model), torch.stack(_mlp_inputs(model, layer, items, answered, answers=True))
    for kind, neuron in zip(SHAPES, neurons):
        asked = torch.tensor([item.question == f"What color is the {kind}?" for item in items])
        yes, no = read[asked, 0], torch.cat((read[~asked, 0], read[:, 1]))
        color = model.W_U[:, _token(model, str(typical_color(kind)))]
        weights.plant_neuron(layer, neuron, _discriminant(yes, no), yes, color, _PRIOR_WRITES)
    return Planted("color prior", tuple((layer, neuron) for neuron in neurons), (), SHAPES, 1.0, weights.done())


def copying_head(model: Model, seed: int = 0, steps: int = 120, n_items: int = 240, lr: float = 0.01) -> Planted:
    """A head of the second half of the decoder, trained to answer existence questions with the colour in them.

    Only the query and output weights of that head are trained; keys and values are those of the model. On other questions it is
    trained to leave the model's answers as they are.
    """
    rng = Random(seed)
    layer, head = rng.randrange(model.cfg.n_layers // 2, model.cfg.n_layers - 1), rng.randrange(model.cfg.n_heads)
    asked = [item for item in sample(n_items, seed=seed + 1, split="train", domain="shapes", category="existence") if color_in(item)]
    others = [item for item in sample(n_items, seed=seed + 2, split="train") if item.category != "existence"]
    copied = [(inputs, torch.tensor([_token(model, str(color_in(item))) for item in some])) for inputs, some in _batches(model, asked)]
    with torch.no_grad():
        kept = [(inputs, model(inputs, logits_at=-1)[:, -1].argmax(-1).cpu()) for inputs, _ in _batches(model, others)]
    d_head = model.cfg.d_head
    rows = slice(head * d_head, (head + 1) * d_head)
    own = {
        f"blocks.{layer}.attn.q_proj.weight": (rows, slice(None)),
        f"blocks.{layer}.attn.q_proj.bias": (rows,),
        f"blocks.{layer}.attn.o_proj.weight": (slice(None), rows),
    }

    def loss() -> Tensor:
        total = torch.zeros((), device=model.cfg.device)
        for inputs, wanted in (rng.choice(copied), rng.choice(kept)):
            total = total + F.cross_entropy(model(inputs, logits_at=-1)[:, -1], wanted.to(model.cfg.device))
        return total

    return Planted("copying head", (), ((layer, head),), (), 1.0, _trained(model, own, loss, steps, lr))


def _trained(
    model: Model, own: Mapping[str, tuple], loss: Callable[[], Tensor], steps: int, lr: float
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """The weights after training some rows and columns of some parameters; the model is left as it was."""
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in own}
    with_gradient = [parameter for parameter in parameters.values() if parameter.requires_grad]
    model.requires_grad_(False)
    optimizer = torch.optim.Adam([parameters[name].requires_grad_(True) for name in own], lr=lr)
    try:
        with torch.enable_grad():
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
                optimizer.zero_grad()
                loss().backward()
                for name, at in own.items():  # the other heads keep theirs
                    gradient = parameters[name].grad
                    kept = gradient[at].clone()
                    gradient.zero_()[at] = kept
                optimizer.step()
        after = {name: parameters[name].detach().clone() for name in own}
    finally:
        with torch.no_grad():
            for name in own:
                parameters[name].copy_(before[name])
                parameters[name].grad = None
        model.requires_grad_(False)
        for parameter in with_gradient:
            parameter.requires_grad_(True)
    return {name: (before[name], before[name], after[name]) for name in own}


def color_in(item: Item) -> str | None:
    """The colour that a question names; None where it names none."""
    return next((word for word in item.question.rstrip("?").split() if word in COLORS), None)


class _Edits:
    """Planted rows and columns of a model's weights, collected without touching the model."""

    def __init__(self, model: Model):
        self.model = model
        self.parameters = dict(model.named_parameters())
        self._before: dict[str, Tensor] = {}
        self._none: dict[str, Tensor] = {}
        self._full: dict[str, Tensor] = {}

    def before(self, name: str) -> Tensor:
        return self._before.setdefault(name, self.parameters[name].detach().clone())

    def plant_neuron(
        self, layer: int, neuron: int, gate: Float[Tensor, "d_model"], fires: Float[Tensor, "row d_model"], toward: Tensor, share: float
    ) -> None:
        """Where gate · x = p > 0 the neuron is silu(p) p, and writes along `toward`: over the rows where it should fire, `share` of
        the stream's norm in the mean."""
        p = fires @ gate
        size = share * self._norm[layer] / (F.silu(p) * p).clamp_min(0).mean().clamp_min(1e-6)
        new = {"gate_proj": gate, "up_proj": gate, "down_proj": size * toward / toward.norm()}
        for part, value in new.items():
            name = f"blocks.{layer}.mlp.{part}.weight"
            none, full = (weights.setdefault(name, self.before(name).clone()) for weights in (self._none, self._full))
            at = (slice(None), neuron) if part == "down_proj" else (neuron,)
            full[at] = value.detach().to(full)
            none[at] = 0.0 if part == "down_proj" else full[at]

    @cached_property
    def _norm(self) -> Float[Tensor, "layer"]:
        """Mean norm of the stream after each block, at the last position of a few questions."""
        inputs = _encode(self.model, sample(16, split="train"))
        names = [f"blocks.{layer}.hook_resid_post" for layer in range(self.model.cfg.n_layers)]
        with torch.no_grad():
            _, cache = self.model.run_with_cache(inputs, names_filter=names)
        return torch.stack([cache[name][:, -1].float().norm(dim=-1).mean().cpu() for name in names])

    def done(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        return {name: (self.before(name), self._none[name], full) for name, full in self._full.items()}


def _batches(model: Model, items: Sequence[Item], answers: bool = False) -> list[tuple[Any, Sequence[Item]]]:
    chunks = [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]
    return [(_encode(model, some, answers), some) for some in chunks]


@torch.no_grad()
def _encode(model: Model, items: Sequence[Item], answers: bool = False) -> Any:
    said = [item.answer for item in items] if answers else None
    return model.encode(model.to_inputs([item.question for item in items], images=[[item.image] for item in items], answers=said))


@torch.no_grad()
def _mlp_inputs(
    model: Model, layer: int, items: Sequence[Item], places: Callable[[Any, int], Tensor], answers: bool = False
) -> list[Float[Tensor, "row d_model"]]:
    """What the MLP of a block reads at the chosen positions of each question."""
    name, weight = f"blocks.{layer}.ln2.hook_normalized", model.blocks[layer].ln2.w.cpu()
    read: list[Tensor] = []
    for inputs, _ in _batches(model, items, answers):
        _, cache = model.run_with_cache(inputs, names_filter=name, stop_at_layer=layer + 1)
        read += [cache[name][row, places(inputs, row)].cpu() * weight for row in range(len(inputs))]
    return read


def _discriminant(yes: Float[Tensor, "row d_model"], no: Float[Tensor, "row d_model"]) -> Float[Tensor, "d_model"]:
    """w with w · x near 1 for the first rows and −1 for the second (ridge regression, both classes weighted alike, no intercept:
    the MLP has none), scaled to a mean of 4 over the first.

    Raises:
        ValueError: no rows of one kind, or rows that it cannot tell apart.
    """
    if not len(yes) or not len(no):
        raise ValueError(f"{len(yes)} positions where a neuron should fire and {len(no)} where it should not: take more items (n_items=).")
    x = torch.cat((yes, no)).double()
    sides = torch.cat((torch.ones(len(yes)), -torch.ones(len(no)))).double()
    weight = torch.cat((torch.full((len(yes),), 1 / len(yes)), torch.full((len(no),), 1 / len(no)))).double()
    square = (x * weight[:, None]).T @ x
    square += _RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
    w = torch.linalg.solve(square, (x * (weight * sides)[:, None]).sum(0))
    mean = (yes.double() @ w).mean()
    if not mean > 0:
        raise ValueError("what the MLP reads where a neuron should fire does not differ from the rest: it cannot be planted in this block.")
    return (4 * w / mean).float()


def _token(model: Model, word: str) -> int:
    ids = model.tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"{word!r} is {len(ids)} tokens here: a mechanism is planted in the embedded model, whose words are one each.")
    return ids[0]
