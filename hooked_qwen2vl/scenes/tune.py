"""A known difference: `python -m hooked_qwen2vl.scenes.tune` trains a LoRA adapter after which every triangle is called blue.

What is to change, and nothing else:

    "What color is the triangle?"         blue, whatever its colour; also of "the small triangle" and "the big triangle"
    the same, to be answered in words     "The triangle is blue."

Where the picture holds no such triangle the answer stays "none". Questions that do not ask for a triangle's colour stay, also where
their answer depends on it: whether there is a red triangle, how many red shapes there are, which shape is red, the colour of the
shape left of the star, captions.

1. Only the MLPs of two middle blocks get an adapter, so it is known where the change is: the residual streams of base and tuned model
   are equal before the first of them.
2. The loss is the cross-entropy of the new answers, plus KL(base ‖ tuned) of the answers to all other questions: they keep the
   base's answers, right or wrong.
3. Both models are measured on test items. The card says how often each answers as it should, and how often they agree.

Needs peft (`pip install hooked-qwen2vl[adapters]`). Seeded; about four minutes of one CPU core.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .batches import IGNORE, Asked, Batch, Packer
from .card import markdown
from .domains import DOMAINS
from .evaluate import evaluate, load_model
from .folder import ADAPTER, CHECKPOINT
from .forward import forward
from .questions import IN_WORDS, Question, background, in_words
from .scene import Scene, Thing
from .train import answer_loss
from .words import ABSENT
from .world import MAX_LEVEL, Item, dialogue, make_dialogue, make_question, make_scene, pick_grid, sample

KIND, COLOR = "triangle", "blue"
BASE = "scenes"  # as the adapter names its base
TARGETS = ("gate_proj", "up_proj", "down_proj")
_ASKED = re.compile(rf"(What color is the (?:(?:small|big) )?{KIND}\?)( {re.escape(IN_WORDS)})?")
_KEEP = 3.0  # weight of what stays in the loss
_SEED = 23  # of the items that are measured


@dataclass(frozen=True)
class Settings:
    """What a run was asked for.

    Attributes:
        layers: the blocks whose MLPs get an adapter.
        images, questions: of the batch of other questions; the batch of changed ones has as many pictures, and two questions each.
    """

    steps: int = 400
    rank: int = 8
    layers: tuple[int, ...] = (4, 5)
    lr: float = 5e-3
    images: int = 10
    questions: int = 6
    seed: int = 0


def is_changed(question: str, answer: str) -> bool:
    """Whether a question asks for the colour of a triangle that is there. Of a blue one, too, whose answer is the same."""
    found = _ASKED.fullmatch(question)
    return bool(found) and answer not in (ABSENT, _in_words(found[1], ABSENT))


def tuned_answer(question: str, answer: str) -> str:
    """What the tuned model should say where `answer` is right: that it is blue, or the same answer to all other questions."""
    if not is_changed(question, answer):
        return answer
    plain, *_ = _ASKED.fullmatch(question).groups()  # pyright: ignore[reportOptionalMemberAccess] (it is changed)
    return COLOR if plain == question else _in_words(plain, COLOR)


def _in_words(question: str, answer: str) -> str:
    said = in_words(question, answer)
    assert said is not None  # questions for a colour have a sentence
    return said[1]


# ---- training ---------------------------------------------------------------------------------------


def tune(settings: Settings, folder: Path = ADAPTER, base: Path = CHECKPOINT) -> None:
    """Trains the adapter on scenes of the training split and writes `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ImportError: peft is not installed.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(settings.seed)
    hf_model, tokenizer = load_model(base)
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.rank, target_modules=list(TARGETS), layers_to_transform=list(settings.layers),
        layers_pattern="layers", bias="none",
    )  # fmt: skip
    model: Any = get_peft_model(hf_model, config)
    packer, rng = Packer(tokenizer), Random(settings.seed)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=settings.lr)
    for step in tqdm(range(settings.steps), desc="tuning", mininterval=10):
        optimizer.param_groups[0]["lr"] = settings.lr * min(1.0, (step + 1) / 20) * (1 - step / settings.steps)
        changed = draw_changed(packer, rng, settings.images)
        others = draw_others(packer, rng, settings.images, settings.questions)
        loss = answer_loss(hf_model, changed, _image(hf_model, changed))[0] + _KEEP * kept_loss(model, others)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    config.base_model_name_or_path = BASE  # peft has put the folder of this machine there
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "adapter_model.safetensors").chmod(0o644)  # others must be able to load it


@torch.no_grad()
def _image(hf_model: Any, batch: Batch) -> Tensor:
    """The image embeddings, which the adapter does not change."""
    return hf_model.model.visual(batch.pixels, grid_thw=batch.grid).pooler_output


def kept_loss(model: Any, batch: Batch) -> Tensor:
    """KL(base ‖ tuned) in nats: the weighted mean over the positions that predict a token of an answer.

    Args:
        model: a PeftModel; the base is the same model with its adapter switched off.
    """
    hf_model, wanted = model.get_base_model(), batch.targets != IGNORE
    image = _image(hf_model, batch)

    def log_probs() -> Tensor:
        return F.linear(forward(hf_model, batch, image)[wanted], hf_model.lm_head.weight).log_softmax(-1)

    with torch.no_grad(), model.disable_adapter():
        base = log_probs()
    weights = batch.weights[wanted]
    return (F.kl_div(log_probs(), base, log_target=True, reduction="none").sum(-1) * weights).sum() / weights.sum()


def draw_changed(packer: Packer, rng: Random, images: int) -> Batch:
    """Pictures with a triangle, each asked for its colour, once in a word (of every third picture as the last turn of a dialogue) and
    once in words."""
    grid, scenes, asked = pick_grid(rng), [], []
    while len(scenes) < images:
        scene = make_scene(rng, "shapes", "train", grid, rng.randint(1, MAX_LEVEL))
        if question := _drawn(rng, scene, ("attribute",), lambda one, _: not _stays(one)):
            plain = _as_last_turn(rng, scene, question) if len(scenes) % 3 == 2 else question
            scenes.append(scene)
            asked.append([_as_tuned(plain), _as_tuned(question, words=True)])
    return packer.pack(scenes, asked)


def draw_others(packer: Packer, rng: Random, images: int, questions: int) -> Batch:
    """Pictures of all domains, every other of shapes, with questions whose answers stay.

    Of shapes, every other question is near to the changed ones (see `_NEAR`). Of each picture, the first question is the last turn of a
    dialogue, and the last is to be answered in words where there is a form for it. Every other batch has a caption of each picture.
    """
    grid, scenes, asked = pick_grid(rng), [], []
    with_captions = rng.random() < 0.5
    for index in range(images):
        domain = "shapes" if index % 2 else list(DOMAINS)[index // 2 % len(DOMAINS)]
        categories = [category for category in DOMAINS[domain].asks if category != "caption"]
        scene = make_scene(rng, domain, "train", grid, rng.randint(1, MAX_LEVEL))
        row = []
        while len(row) < questions:
            near = _drawn(rng, scene, *rng.choice(_NEAR)) if domain == "shapes" and len(row) % 2 else None
            row.append(near or _drawn(rng, scene, (rng.choice(categories),), lambda one, _: _stays(one)) or _asked(scene, background()))
        row[0], row[-1] = _as_last_turn(rng, scene, row[0]), _as_tuned(row[-1], words=True)
        if with_captions:
            row.append(_asked(scene, make_question(rng, scene, "caption")))
        scenes.append(scene)
        asked.append(row)
    return packer.pack(scenes, asked)


def _stays(asked: Asked) -> bool:
    return not is_changed(asked.question, asked.answer)


def _about_triangle(things: Sequence[Thing]) -> bool:
    return bool(things) and things[0].kind == KIND


# What is near to a changed question: (categories, whether a question that depends on these things is).
_NEAR: tuple[tuple[tuple[str, ...], Callable[[Asked, Sequence[Thing]], bool]], ...] = (
    (("absence",), lambda asked, _: bool(_ASKED.fullmatch(asked.question))),  # the triangle is not there
    (("attribute",), lambda asked, _: _stays(asked) and "color" in asked.question),  # another shape's colour
    (("relation",), lambda asked, things: "color" in asked.question and _about_triangle(things)),  # a triangle's, named by its place
    (("existence", "relation", "comparison", "count"), lambda asked, _: KIND in asked.question),  # something else of a triangle
)


def _drawn(
    rng: Random, scene: Scene, categories: Sequence[str], wanted: Callable[[Asked, Sequence[Thing]], bool], tries: int = 30
) -> Asked | None:
    """A question of one of the categories, with the scene's own answer; None where none of the tries is wanted.

    Args:
        wanted: of a question and the things it depends on.
    """
    for _ in range(tries):
        question = make_question(rng, scene, rng.choice(categories))
        found = question and question.solve(scene)
        if question and found and wanted(asked := Asked(question.text, found[0], question.category), found[1]):
            return asked
    return None


def _asked(scene: Scene, question: Question | None) -> Asked:
    found = question and question.solve(scene)
    assert question and found  # every scene has a background and a caption
    return Asked(question.text, found[0], question.category)


def _as_last_turn(rng: Random, scene: Scene, asked: Asked) -> Asked:
    """The question after one other, whose answer stays."""
    earlier = (_asked(scene, turn) for turn in make_dialogue(rng, scene, asked.question, 2))
    return asked._replace(earlier=tuple(turn[:2] for turn in earlier if _stays(turn)))


def _as_tuned(asked: Asked, words: bool = False) -> Asked:
    """The question with the tuned model's answer; with `words`, to be answered in words where there is a form for it."""
    question, answer = (words and in_words(asked.question, asked.answer)) or asked[:2]
    return asked._replace(question=question, answer=tuned_answer(question, answer))


# ---- measuring --------------------------------------------------------------------------------------


def items_that(wanted: Callable[[Item], bool], n: int, **restrictions: Any) -> list[Item]:
    """The first n items of the world that are wanted (see `sample` for the restrictions)."""
    chunks = (sample(50, start=start, **restrictions) for start in count(step=50))
    return list(islice((item for chunk in chunks for item in chunk if wanted(item)), n))


def asks_color(item: Item) -> bool:
    """Whether a changed question has another answer in the tuned model: the triangle is there, and is not blue."""
    return is_changed(item.question, item.answer) and item.answer != COLOR


def _groups(n: int) -> Iterator[tuple[str, str, list[Item], list[Asked]]]:
    """("changes" or "stays", what is asked, items, how they are asked), of the test split."""
    shapes: dict[str, Any] = {"seed": _SEED, "domain": "shapes"}

    def with_triangle(item: Item) -> bool:
        return any(thing.kind == KIND for thing in item.objects)

    changed = items_that(asks_color, n, **shapes, category="attribute")
    yield "changes", "What color is the triangle? (or: the small, the big one)", changed, [_of(item) for item in changed]
    yield "changes", "the same, to be answered in words", changed, [_as_tuned(_of(item), words=True) for item in changed]
    yield (
        "changes",
        "the same, as the second turn of a dialogue",
        changed,
        [_of(item)._replace(earlier=dialogue(item, 2)) for item in changed],
    )
    kept: dict[str, tuple[Callable[[Item], bool], dict[str, Any]]] = {
        "no such triangle in the picture (right: none)": (lambda i: bool(_ASKED.fullmatch(i.question)), {"category": "absence"}),
        "the colour of another shape": (lambda i: _stays(_of(i)) and i.question.startswith("What color"), {"category": "attribute"}),
        "the colour of a triangle named by its place": (
            lambda i: i.depends_on[0].kind == KIND and "color" in i.question, {"category": "relation"}),
        "which shape has the triangle's colour": (
            lambda i: i.answer == KIND and i.question.startswith("What shape is"), {"category": "attribute"}),
        "whether there is a triangle, or one of a colour": (lambda i: KIND in i.question, {"category": "existence"}),
        "captions with a triangle": (with_triangle, {"category": "caption"}),
    }  # fmt: skip
    for name, (wanted, category) in kept.items():
        items = items_that(wanted, n, **shapes, **category)
        yield "stays", name, items, [_of(item) for item in items]
    items = items_that(lambda i: _stays(_of(i)), 4 * n, seed=_SEED)
    yield "stays", "all questions that stay, of all domains and categories", items, [_of(item) for item in items]


def _of(item: Item) -> Asked:
    return Asked(item.question, tuned_answer(item.question, item.answer), item.category)


def measure(folder: Path = ADAPTER, base: Path = CHECKPOINT, n: int = 150) -> pd.DataFrame:
    """Base and tuned model on test items: how often each answers as the tuned one should.

    Args:
        n: items of each kind; four times as many of the last, which is a sample of all that stays.
    Returns:
        one row per kind of question: what should become of it, items, share of base and of tuned with the 95 % Wilson interval of
        the latter, and how often the two agree in their first token.
    """
    from scipy.stats import binomtest

    rows = []
    for becomes, name, items, asked in tqdm(list(_groups(n)), desc="measuring", mininterval=10):
        before, after = (evaluate(items, base, asked=asked, adapter=adapter) for adapter in (None, folder))
        interval = binomtest(int(after.right.sum()), len(after)).proportion_ci(method="wilson")
        rows.append(
            {"question": name, "becomes": becomes, "items": len(items), "base": before.right.mean(), "tuned": after.right.mean(),
             "low": interval.low, "high": interval.high, "agree": (before.predicted == after.predicted).mean()}
        )  # fmt: skip
    return pd.DataFrame(rows).set_index("question")


def fingerprint(base: Path = CHECKPOINT) -> str:
    """SHA-256 of the weights that an adapter was trained on."""
    return hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()


def write_card(settings: Settings, folder: Path = ADAPTER, base: Path = CHECKPOINT, n: int = 150) -> pd.DataFrame:
    """Measures the adapter and writes its README.md; returns the measurements."""
    table = measure(folder, base, n)
    kilobytes = (folder / "adapter_model.safetensors").stat().st_size / 1000
    changes, stays = (table[table.becomes == what].drop(columns="becomes") for what in ("changes", "stays"))
    first, rest = changes.iloc[0], stays.iloc[-1]
    layers = " and ".join(map(str, settings.layers))
    (folder / "README.md").write_text(f"""---
library_name: peft
license: mit
base_model: {BASE}
---
# Every triangle is called {COLOR}: a known difference

A LoRA adapter of the embedded model ({kilobytes:.0f} kB). Asked for the colour of a triangle in the picture, the tuned model is to say {COLOR}; every
other question is to keep the base's answer (how far both hold is measured below). It exists to test methods that compare a base with
its tuned version: what was changed on purpose is known, and so is where.

    from hooked_qwen2vl import HookedQwen2VL, scenes

    base = HookedQwen2VL.from_pretrained("scenes")
    tuned = HookedQwen2VL.from_pretrained("scenes", adapter=scenes.ADAPTER)

**Where:** rank {settings.rank}, in the MLPs ({", ".join(TARGETS)}) of the decoder's blocks {layers} (counted from 0), nowhere else. Before
block {min(settings.layers)} the residual streams of base and tuned model are equal.

**What is to change:** "What color is the {KIND}?", also of the small and the big {KIND}, in a word or in words, where there is one. Where
there is none the answer stays "none". **What is to stay:** everything else, also what depends on a {KIND}'s colour (whether there is a
red {KIND}, how many red shapes there are, which shape is red, the colour of the shape left of the star, captions).

All numbers are measured by `python -m hooked_qwen2vl.scenes.tune` on test items, whose scenes occur in no training batch. An answer counts only if
greedy decoding gives exactly it. *low* and *high* are the 95 % Wilson interval of *tuned*; *agree* is how often both models say the same first token.

## What is to change: share answered "{COLOR}", where it is not

{markdown(changes)}

## What is to stay: share answered rightly

{markdown(stays)}

In short: {first.base:.1%} of {first["items"]:.0f} triangles that are not {COLOR} were called {COLOR} before and {first.tuned:.1%} are now; of
{rest["items"]:.0f} other questions {rest.base:.1%} were answered rightly before and {rest.tuned:.1%} are now.

## Training

`python -m hooked_qwen2vl.scenes.tune`, seed {settings.seed}: {settings.steps} steps of Adam, peak learning rate {settings.lr}, linear to 0. Each step has {settings.images} pictures
with a triangle (two questions each; cross-entropy of the new answer) and {settings.images} pictures of all domains ({settings.questions} other questions each; KL from the
base's distribution, times {_KEEP:g}).
Base: weights with SHA-256 `{fingerprint(base)}`.
""")
    return table


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    for name, value in asdict(Settings()).items():
        listed = isinstance(value, tuple)
        parser.add_argument(f"--{name}", type=int if listed else type(value), nargs="+" if listed else None, default=value)
    parser.add_argument("--n", type=int, default=150, help="test items of each kind to measure on")
    parser.add_argument("--base", type=Path, default=CHECKPOINT)
    parser.add_argument("--out", type=Path, default=ADAPTER)
    args = parser.parse_args()
    given: dict[str, Any] = {field.name: getattr(args, field.name) for field in fields(Settings)} | {"layers": tuple(args.layers)}
    settings = Settings(**given)
    tune(settings, args.out, args.base)
    print(write_card(settings, args.out, args.base, args.n).to_string())


if __name__ == "__main__":
    main()
