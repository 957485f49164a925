"""How well a checkpoint answers the world's items, with and without the picture, and at which depth."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from .batches import IGNORE, Asked, Batch, Packer
from .cells import LABELS
from .folder import CHECKPOINT
from .forward import forward
from .questions import in_words
from .world import Item, dialogue, sample, shortcuts, single_hops

if TYPE_CHECKING:
    import pandas as pd

_BATCH = 32


def load_model(folder: str | Path = CHECKPOINT, adapter: str | Path | None = None):
    """(model, tokenizer) of a checkpoint folder, with transformers' own classes.

    Args:
        adapter: a PEFT folder, which peft merges into the weights.
    """
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(folder)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()  # pyright: ignore[reportCallIssue] (a wrapped method)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def evaluate(
    items: Sequence[Item],
    folder: str | Path = CHECKPOINT,
    blind: bool = False,
    seed: int = 0,
    asked: Sequence[Asked] | None = None,
    adapter: str | Path | None = None,
) -> pd.DataFrame:
    """One row an item, in order: whether the model's greedy answer is right, and when it emerges.

    An answer is right when every token of it, and the end after it, is the most likely one: that is when
    greedy decoding gives exactly this answer.

    Args:
        blind: with noise of the picture's mean and spread in its place.
        asked: what to ask of each item's picture instead of its own question.
        adapter: a PEFT folder, see `load_model`.
    Returns:
        columns question, answer, category, domain, typical, unseen, predicted (the first answer token),
        right, and depth: the layer (0 = embeddings, n_layers = the output) from which on the top-1
        at the last position is what the model answers.
    """
    import pandas as pd

    model, tokenizer = load_model(folder, adapter)
    asked = [Asked(item.question, item.answer, item.category) for item in items] if asked is None else asked
    generator = torch.Generator().manual_seed(seed)
    rows: dict[int, dict] = {}
    for chunk, batch, streams in _runs(model, tokenizer, items, asked, generator if blind else None):
        at = torch.tensor([position for _, position, _, _ in batch.labels])
        lens = torch.stack([(s[torch.arange(len(chunk)), at] @ model.lm_head.weight.T).argmax(-1) for s in streams])
        last = torch.arange(batch.tokens.shape[1]) >= at[:, None]  # of a dialogue, the last answer
        wanted = (batch.targets != IGNORE) & last
        predicted = (streams[-1] @ model.lm_head.weight.T).argmax(-1)
        right = ((predicted == batch.targets) | ~wanted).all(-1)
        for row, index in enumerate(chunk):
            item, said = items[index], asked[index]
            same = (lens[:, row] == lens[-1, row]).tolist()
            rows[index] = {
                "question": said.question, "answer": said.answer, "category": said.category, "domain": item.domain,
                "typical": item.typical, "unseen": item.unseen, "predicted": tokenizer.decode(lens[-1, row]),
                "right": bool(right[row]), "depth": len(same) - _trailing(same),
            }  # fmt: skip
    return pd.DataFrame([rows[index] for index in range(len(items))])


@torch.no_grad()
def _runs(
    model, tokenizer, items: Sequence[Item], asked: Sequence[Asked], noise: torch.Generator | None = None
) -> Iterator[tuple[list[int], Batch, list[torch.Tensor]]]:
    """(indices, packed batch, normed streams of every layer) of the items, by grid; with noise in the pictures' place."""
    packer = Packer(tokenizer)
    by_grid: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        by_grid[item.grid].append(index)
    chunks = [ids[i : i + _BATCH] for ids in by_grid.values() for i in range(0, len(ids), _BATCH)]
    for chunk in tqdm(chunks, desc="measuring" if noise is None else "blind", leave=False, disable=len(chunks) < 5):
        batch = packer.pack([items[i].scene for i in chunk], [[asked[i]] for i in chunk])
        if noise is not None:
            batch.pixels.normal_(generator=noise)
        yield chunk, batch, _residual_streams(model, batch)


def _residual_streams(model, batch) -> list[torch.Tensor]:
    """[batch pos d_model] of every layer, normed once."""
    layers = model.model.language_model
    raw: list[torch.Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: raw.append(args[0])) for layer in layers.layers]
    try:
        last = forward(model, batch)  # normed already
    finally:
        for hook in hooks:
            hook.remove()
    return [layers.norm(stream) for stream in raw] + [last]


def _trailing(same: list[bool]) -> int:
    """How many values at the end are True."""
    return next((n for n, ok in enumerate(reversed(same)) if not ok), len(same))


def best_without_image(items: Sequence[Item], n: int = 6000, seed: int = 1) -> list[bool]:
    """Whether each answer is the most frequent one to its question among n training items (unknown question:
    of its category and domain)."""
    by_question: dict[str, Counter] = defaultdict(Counter)
    by_kind: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for item in sample(n, seed=seed, split="train"):
        by_question[item.question][item.answer] += 1
        by_kind[item.domain, item.category][item.answer] += 1
    counts = [by_question.get(item.question) or by_kind[item.domain, item.category] for item in items]
    return [item.answer == count.most_common(1)[0][0] for item, count in zip(items, counts)]


def relations_beside_shortcuts(folder: str | Path, items: Sequence[Item]) -> pd.DataFrame:
    """Accuracy of the relation questions, all, of charts, and by number of things, beside the shortcuts (see
    `world.shortcuts`; the score of a choice among them at random), and of both single hops."""
    import pandas as pd

    items = [item for item in items if item.category == "relation"]
    table = evaluate(items, folder)
    table["things"] = [len(item.objects) for item in items]
    hops = [single_hops(item) for item in items]
    right = [evaluate([pair[n] for pair in hops], folder).right for n in (0, 1)]
    table["both single hops"] = right[0] & right[1]
    kinds = ("on that side", "neighbors", "others")
    for kind in kinds:
        table[kind] = [_chance(item, kind) for item in items]
    parts = {"all": table, "charts": table[table.domain == "charts"]}
    parts |= {f"{n} things": part for n, part in table.groupby("things")}
    return pd.DataFrame(
        {
            name: {"items": len(part), "accuracy": part.right.mean(), **part[["both single hops", *kinds]].mean()}
            for name, part in parts.items()
        }
    ).T.rename(columns={"on that side": "any on that side", "neighbors": "any neighbour", "others": "any other thing"})


def _chance(item: Item, kind: str) -> float:
    """The share of a shortcut's things that wear the right answer."""
    things = shortcuts(item.scene, item.depends_on, item.question, item.candidates)[kind]
    return sum(item.answer in (thing.color, thing.kind) for thing in things) / len(things)


def beyond_short_answers(folder: str | Path, n: int = 500, seed: int = 11) -> pd.DataFrame:
    """Accuracy on what is not there, in words, and in the third turn of a dialogue."""
    import pandas as pd

    absent = sample(n, seed=seed, category="absence")
    plain = [item for item in sample(2 * n, seed=seed) if in_words(item.question, item.answer)][:n]
    said = [Asked(*words, item.category) for item in plain if (words := in_words(item.question, item.answer))]
    talks = [Asked(i.question, i.answer, i.category, dialogue(i, 3)) for i in plain]
    rows = {
        "absent": evaluate(absent, folder),
        "in words": evaluate(plain, folder, asked=said),
        "third turn": evaluate(plain, folder, asked=talks),
        "the same, asked alone": evaluate(plain, folder),
    }
    return pd.DataFrame({name: {"items": len(table), "accuracy": table.right.mean()} for name, table in rows.items()}).T


def readable_tokens(folder: str | Path, n: int = 300, seed: int = 11) -> pd.DataFrame:
    """Share of the image tokens on things that read as the thing's colour or kind, on test items; beside the things of another
    picture of the same grid, cell by cell.

    Read in two ways: the lens's top-1, and the nearest word embedding by cosine after the mean image token (of the batch) is
    subtracted, which neither the embeddings' lengths nor what all image tokens share decide. Each at the layer that is best on
    validation items, and at layer 0, what the tower and the projector write.
    """
    import pandas as pd

    model, tokenizer = load_model(folder)
    rows = {}
    for way, reading in (("lens", _by_logits), ("cosine", _by_cosine)):
        shares = {}
        for split in ("validation", "test"):
            items = sample(n, seed=seed, split=split)
            asked = [Asked(item.question, item.answer, item.category) for item in items]
            hits, controls = [], []
            for _, batch, streams in _runs(model, tokenizer, items, asked):
                image = batch.tokens[0] == model.config.image_token_id
                read = torch.stack([reading(s[:, image], model.lm_head.weight) for s in streams])  # layer row cell
                labels = batch.cells.unflatten(0, (len(read[0]), -1))
                filled = labels[..., 0] > 0
                for found, of in ((hits, labels), (controls, labels.roll(1, 0))):
                    also = filled & (of[..., 0] > 0)
                    if found is controls and len(of) == 1:  # no other picture in this batch
                        also = torch.zeros_like(also)
                    found.append(_names(read[:, also], of[also], tokenizer))
            shares[split] = [torch.cat(found, 1).float().mean(1) for found in (hits, controls)]
        best = int(shares["validation"][0].argmax())
        for name, layer in (("best layer", best), ("embeddings", 0)):
            seen, other = (float(share[layer]) for share in shares["test"])
            rows[f"{way}, {name}"] = {"layer": layer, "read": seen, "of another picture": other}
    return pd.DataFrame(rows).T


def _by_logits(tokens: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    return (tokens @ words.T).argmax(-1)


def _by_cosine(tokens: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    return _by_logits(tokens - tokens.mean((0, 1)), torch.nn.functional.normalize(words, dim=-1))


def _names(read: torch.Tensor, labels: torch.Tensor, tokenizer) -> torch.Tensor:
    """[layer cell] whether a token is the kind or the colour of the cell's thing, in any case, with a space or without."""
    words = [tokenizer.decode(token).strip().lower() for token in range(len(tokenizer))]
    index = {word: number for number, word in enumerate(dict.fromkeys(words))}
    word_of = torch.tensor([index[word] for word in words])
    found = torch.zeros(read.shape, dtype=torch.bool)
    for head, name in enumerate(("kind", "color")):
        ids = torch.tensor([index.get(label.lower(), -1) for label in LABELS[name]])
        found |= word_of[read] == ids[labels[:, head]]
    return found
