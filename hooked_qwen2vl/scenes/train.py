"""Trains the embedded model: `python -m hooked_qwen2vl.scenes.train`.

A genuine `Qwen2VLForConditionalGeneration` from random weights, in three stages:

    reading   the decoder answers questions about scenes that are written, a cell a token, in its own word embeddings
              (see `cells`); no picture and no tower yet
    seeing    the vision tower and the projector learn to say of a picture what was written of its scene
    together  all of the model answers questions about pictures, with the loss on the answers only

Several questions a picture (see `batches`), under a curriculum: a domain's scenes get one more object whenever its
running accuracy passes. Relations, which shortcuts pass for, come in crowded scenes where the shortcuts fail; glyphs, which
are the hardest to see, are most of the pictures from which the tower learns. In each stage the learning rate is constant
after a warm-up and falls linearly to 0 over the last part. Seeded and resumable; uses CUDA where there is one.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from ..files import whole_file
from .batches import IGNORE, Batch, Mix, Packer, draw_batch, raise_level, start_levels
from .card import write_card
from .cells import LABELS, cell_embeddings
from .folder import CHECKPOINT, build_config, build_tokenizer, save_folder
from .forward import forward
from .words import DOMAINS as DOMAIN_NAMES
from .world import MAX_LEVEL, pick_grid

STATE = Path("out/scenes-training.pt")
_DOMAINS = {
    "reading": DOMAIN_NAMES,
    "seeing": (*DOMAIN_NAMES, *("glyphs",) * 10),
    "together": (*DOMAIN_NAMES, *DOMAIN_NAMES, *("glyphs",) * 3, *("shapes",) * 2),
}  # of 15 pictures
CURRICULUM_GRIDS = ((4, 4), (4, 5), (5, 4))  # while most domains are still at one or two objects


@dataclass
class Settings:
    """What a run was asked for."""

    reading_minutes: float = 60
    seeing_minutes: float = 15
    minutes: float = 60  # of the last stage
    lr: float = 5e-4
    warmup: int = 150
    decay: float = 0.3  # share of a stage over which the learning rate falls to 0
    weight_decay: float = 0.02
    images: int = 15
    questions: int = 8
    noise: float = 0.1  # of the written cells, beside their own spread
    seed: int = 0
    pass_mark: float = 0.85
    crowded: tuple[float, float] = (0.3, 0.8)  # the part of the first stage in which most questions are relations
    start: str = ""  # a folder whose weights a run begins from, token by token where the vocabularies differ
    level: int = 1  # of every domain, at the start: 1..5

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of each stage."""
        return {"reading": 60 * self.reading_minutes, "seeing": 60 * self.seeing_minutes, "together": 60 * self.minutes}


@dataclass
class Progress:
    """Where a run stands; saved with the weights."""

    step: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("reading", "seeing", "together"), 0.0))
    steps: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("reading", "seeing", "together"), 0))
    levels: dict[str, int] = field(default_factory=start_levels)
    running: dict[str, float] = field(default_factory=dict)  # domain -> running accuracy, but for relations
    table: dict[str, float] = field(default_factory=dict)  # "domain category" -> running accuracy
    log: list[dict] = field(default_factory=list)
    kinds: float = 0.0  # running share of the cells whose kind the tower tells, in its own stage


def learning_rate(settings: Settings, stage: str, step: int, seconds: float) -> float:
    """Warm-up by steps, constant, then linear to 0 over the last part of the stage."""
    left = max(0.0, 1 - seconds / settings.stages[stage])
    return settings.lr * min(1.0, (step + 1) / settings.warmup) * min(1.0, left / settings.decay)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the device."""
    moved: dict[str, Any] = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(batch).items()}
    return Batch(**moved)


def answer_loss(model, batch: Batch, image: torch.Tensor | None = None) -> tuple[torch.Tensor, list[bool]]:
    """(loss, whether each first answer token was right); `image` as for `forward`."""
    hidden = forward(model, batch, image)
    wanted = batch.targets != IGNORE
    logits = F.linear(hidden[wanted], model.lm_head.weight)
    targets, weights = batch.targets[wanted], batch.weights[wanted]
    loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
    right = torch.zeros_like(wanted)
    right[wanted] = logits.argmax(-1) == targets
    rows, positions = zip(*((row, at) for row, at, _, _ in batch.labels))
    return loss, right[list(rows), list(positions)].tolist()


def seeing_loss(tokens: torch.Tensor, written: torch.Tensor, heads: nn.ModuleList, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(loss, share of the things' cells whose kind is told): image tokens beside what is written of their cells, and
    linear heads, thrown away afterwards, that tell each cell's labels from them.

    Args:
        tokens, written: [cell d_model].
        labels: [cell head].
    """
    filled = labels[:, 0] > 0
    weight = torch.where(filled, 1.0, 0.15)
    logits = [head(tokens) for head in heads]
    told = sum(F.cross_entropy(each, labels[:, k], reduction="none") for k, each in enumerate(logits))
    apart = (tokens - written).square().sum(-1) / written.square().sum(-1).mean()
    right = (logits[0][filled].argmax(-1) == labels[filled, 0]).float().mean().item()
    return ((told + 4 * apart) * weight).sum() / weight.sum(), right


def update(progress: Progress, batch: Batch, right: list[bool], pass_mark: float) -> None:
    """Running accuracies, and the next level for a domain that passes."""
    by_domain: dict[str, list[bool]] = {}
    by_kind: dict[str, list[bool]] = {}
    for ok, (_, _, domain, category) in zip(right, batch.labels):
        if category not in ("caption", "relation"):
            by_domain.setdefault(domain, []).append(ok)
        by_kind.setdefault(f"{domain} {category}", []).append(ok)
    for table, seen, pace in ((progress.running, by_domain, 0.04), (progress.table, by_kind, 0.02)):
        for key, values in seen.items():
            mean = sum(values) / len(values)
            table[key] = table.get(key, 0.0) + pace * (mean - table.get(key, 0.0))
    for domain, accuracy in progress.running.items():
        if accuracy > pass_mark and raise_level(progress.levels, domain):
            progress.running[domain] = 0.6


def choose_mix(settings: Settings, stage: str, progress: Progress) -> Mix:
    """More of what is hard: mostly relations, in crowded scenes, in the middle of the first stage; pictures of glyphs, which
    are the hardest to see, in the others."""
    weights: dict[Any, float] = {tuple(k.split()): 0.4 + 3 * (1 - v) for k, v in progress.table.items()}
    share = progress.seconds["reading"] / max(settings.stages["reading"], 1e-9)
    if stage == "reading" and share < settings.crowded[0]:
        return Mix(progress.levels, weights)
    middle = stage == "reading" and share < settings.crowded[1]
    return Mix(progress.levels, weights, relation=0.75 if middle else 0.5, crowded=True, domains=_DOMAINS[stage])


def decaying_matrices(model: torch.nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that lets matrices decay, and norms and biases not."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


class Trainer:
    """A run: the model, the tower's heads, the optimizer, and where it stands.

    Args:
        state: the file an interrupted run goes on from, written every `save_every` seconds.
        out: the folder the model is saved to.
    """

    def __init__(self, settings: Settings, state: Path, out: Path, save_every: float = 120):
        if not 1 <= settings.level <= MAX_LEVEL:
            raise ValueError(f"level must be in 1..{MAX_LEVEL}, got {settings.level}.")
        self.settings, self.state, self.out, self.save_every = settings, state, out, save_every
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(settings.seed)
        self.rng = Random(settings.seed)
        self.tokenizer = build_tokenizer()
        self.packer = Packer(self.tokenizer)
        model = Qwen2VLForConditionalGeneration(build_config(self.tokenizer))
        self.model = model.to(self.device).train()  # pyright: ignore[reportArgumentType] (transformers' `to` is wrapped)
        _linear_patch_embed(self.model)
        d_model = self.model.lm_head.in_features
        self.heads = nn.ModuleList(nn.Linear(d_model, len(classes)) for classes in LABELS.values()).to(self.device)
        self.optimizer = decaying_matrices(nn.ModuleList([self.model, self.heads]), settings.weight_decay)
        self.progress = Progress(levels=dict.fromkeys(start_levels(), settings.level))
        if state.exists():
            self._load()
        elif settings.start:
            take_weights(self.model, self.tokenizer, settings.start)

    def run(self) -> Progress:
        """Every stage to the end of its time."""
        last = time.monotonic()
        for stage, seconds in self.settings.stages.items():
            bar = tqdm(total=round(seconds), initial=round(self.progress.seconds[stage]), unit="s", desc=stage, mininterval=10)
            began = time.monotonic() - self.progress.seconds[stage]
            while self.progress.seconds[stage] < seconds:
                summary = self.step(stage)
                self.progress.seconds[stage] = time.monotonic() - began
                bar.update(round(self.progress.seconds[stage]) - bar.n)
                if self.progress.step % 50 == 0:
                    bar.set_postfix_str(summary)
                if time.monotonic() - last > self.save_every:
                    self.save()
                    last = time.monotonic()
            bar.close()
        self.save()
        return self.progress

    def step(self, stage: str) -> str:
        """One batch; returns how it stands, in a line."""
        settings, progress = self.settings, self.progress
        early = sum(progress.levels.values()) < 10
        grid = self.rng.choice(CURRICULUM_GRIDS) if early and self.rng.random() < 0.8 else pick_grid(self.rng)
        mix = choose_mix(settings, stage, progress)
        batch = draw_batch(self.packer, self.rng, mix, grid, settings.images, settings.questions, pictures=stage != "reading")
        batch = to_device(batch, self.device)
        rate = learning_rate(settings, stage, progress.steps[stage], progress.seconds[stage])
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if stage == "seeing":
            loss = self._see(batch)
        else:
            written = self._written(batch) if stage == "reading" else None
            loss, right = answer_loss(self.model, batch, written)
            update(progress, batch, right, settings.pass_mark)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        progress.step += 1
        progress.steps[stage] += 1
        if progress.step % 50 == 0:
            progress.log.append(self._entry(stage, loss.item()))
            return " ".join(f"{k} {v}" for k, v in progress.log[-1].items())
        return ""

    def _written(self, batch: Batch) -> torch.Tensor:
        cells = cell_embeddings(self.model.lm_head.weight, self.tokenizer, batch.cells)
        return cells + self.settings.noise * cells.std().detach() * torch.randn_like(cells)

    def _see(self, batch: Batch) -> torch.Tensor:
        tokens = self.model.model.visual(batch.pixels, grid_thw=batch.grid).pooler_output.view(len(batch.cells), -1)
        written = cell_embeddings(self.model.lm_head.weight.detach(), self.tokenizer, batch.cells)
        loss, right = seeing_loss(tokens, written, self.heads, batch.cells)
        self.progress.kinds += 0.02 * (right - self.progress.kinds)
        return loss

    def _entry(self, stage: str, loss: float) -> dict:
        progress = self.progress
        relation = {f"{k.split()[0]}-relation": round(v, 3) for k, v in progress.table.items() if k.endswith("relation")}
        entry = {"step": progress.step, "stage": stage, "seconds": round(progress.seconds[stage]), "loss": round(loss, 4)}
        if stage == "seeing":
            return {**entry, "kinds": round(progress.kinds, 3)}
        return {**entry, "levels": sum(progress.levels.values()), **{k: round(v, 3) for k, v in progress.running.items()}, **relation}

    def save(self) -> None:
        """The state and the model's folder, as they stand."""
        about = {"progress": asdict(self.progress), "rng": self.rng.getstate(), "torch_rng": torch.get_rng_state()}
        parts = {"model": self.model, "heads": self.heads, "optimizer": self.optimizer}
        with whole_file(self.state) as file:
            torch.save({**{name: part.state_dict() for name, part in parts.items()}, **about}, file)
        save_folder(self.model, self.tokenizer, self.out)
        about = {"how": self._how(), "settings": asdict(self.settings), "steps": self.progress.steps, "kinds": self.progress.kinds,
                 "seconds": {stage: round(s) for stage, s in self.progress.seconds.items()},
                 "threads": torch.get_num_threads(), "device": self.device.type, "log": self.progress.log}  # fmt: skip
        (self.out / "training.json").write_text(json.dumps(about) + "\n")

    def _how(self) -> str:
        settings, progress = self.settings, self.progress
        minutes = {stage: f"{progress.steps[stage]} steps in {seconds / 60:.0f} minutes" for stage, seconds in progress.seconds.items()}
        levels = ", ".join(f"{domain} {level}" for domain, level in progress.levels.items())
        return f"""`python -m hooked_qwen2vl.scenes.train`, seed {settings.seed}, on {self.device.type} ({torch.get_num_threads()} threads){f", from {Path(settings.start).name}" if settings.start else ""}. First the decoder alone
reads scenes that are written in its own word embeddings, a cell a token ({minutes["reading"]}; of this time from
{settings.crowded[0]:.0%} to {settings.crowded[1]:.0%} mostly relations in crowded scenes). Then the tower and the projector learn to say of a picture what
was written of its scene, glyphs in most pictures ({minutes["seeing"]}; {progress.kinds:.1%} of the kinds right at the end). Then all of
the model answers questions about pictures ({minutes["together"]}), with the loss on the answers only.
AdamW, peak learning rate {settings.lr}, {settings.warmup} steps of warm-up, linear to 0 over the last {settings.decay:.0%} of each stage; {settings.images} pictures ×
{settings.questions} questions a step, each with the positions and the view of a single-turn prompt; one batch in four each with
captions, a question answered in words, and a dialogue. A domain's scenes get one more object when its running accuracy
passes {settings.pass_mark:.0%}; harder categories are drawn more often. Levels (of 5): {levels}."""

    def _load(self) -> None:
        saved = torch.load(self.state, map_location=self.device, weights_only=False)
        for name in ("model", "heads", "optimizer"):
            getattr(self, name).load_state_dict(saved[name])
        self.progress = Progress(**saved["progress"])
        self.rng.setstate(saved["rng"])
        torch.set_rng_state(saved["torch_rng"].cpu())


@torch.no_grad()
def take_weights(model: Qwen2VLForConditionalGeneration, tokenizer: Any, folder: str | Path) -> None:
    """Gives the model the weights of a folder of the same architecture; tokens that the folder does not have keep theirs.

    Raises:
        ValueError: another architecture.
    """
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(folder).state_dict()
    known = AutoTokenizer.from_pretrained(folder).get_vocab()
    own, by_token = model.state_dict(), ("model.language_model.embed_tokens.weight", "lm_head.weight")  # one tensor, tied
    shapes = [{name: w.shape for name, w in weights.items() if name not in by_token} for weights in (own, theirs)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{folder} is of another architecture than the embedded model: a run cannot begin from its weights.")
    for name in shapes[0]:
        own[name].copy_(theirs[name])
    here, there = zip(*((index, known[token]) for token, index in tokenizer.get_vocab().items() if token in known))
    own[by_token[0]][list(here)] = theirs[by_token[0]][list(there)]


def train(settings: Settings, state: Path = STATE, out: Path = CHECKPOINT) -> Progress:
    """Trains every stage to its end, going on from `state` where there is one, and saves to `out`."""
    return Trainer(settings, state, out).run()


def _linear_patch_embed(model) -> None:
    """The patch embedding as the matrix product it is: three times as fast on a CPU as the convolution."""
    embed = model.model.visual.patch_embed
    embed.forward = lambda pixels: F.linear(pixels, embed.proj.weight.flatten(1))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    defaults = Settings()
    for name, value in asdict(defaults).items():
        if isinstance(value, tuple):
            parser.add_argument(f"--{name}", type=float, nargs=2, default=value)
        else:
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--state", type=Path, default=STATE, help="where an interrupted run goes on from")
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    parser.add_argument("--card-only", action="store_true", help="measure the checkpoint and write its card")
    args = vars(parser.parse_args())
    state, out, card_only = args.pop("state"), args.pop("out"), args.pop("card_only")
    if not card_only:
        train(Settings(**args), state, out)
    print(write_card(out).to_string())


if __name__ == "__main__":
    main()
