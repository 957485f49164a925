"""Trains the embedded model: `python -m hooked_qwen2vl.scenes.train`.

A genuine `Qwen2VLForConditionalGeneration` from random weights, in two stages: the vision tower learns to see
(see `tower`); then all of the model answers, several questions a picture with the loss on the answers only
(see `batches`), under a curriculum: a domain's scenes get one more object whenever its
running accuracy passes 90 %. The learning rate is constant after a warm-up and falls linearly to 0 over the
last part of the given time. Seeded and resumable; uses CUDA where there is one.
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
from tqdm import tqdm
from transformers import Qwen2VLForConditionalGeneration

from ..files import whole_file
from .batches import IGNORE, Batch, Packer, draw_batch, raise_level, start_levels
from .card import write_card
from .folder import CHECKPOINT, build_config, build_tokenizer, save_folder
from .forward import forward
from .tower import teach_tower
from .world import pick_grid

STATE = Path("out/scenes-training.pt")
CURRICULUM_GRIDS = ((4, 4), (4, 5), (5, 4))  # while most domains are still at one or two objects


@dataclass
class Settings:
    """What a run was asked for."""

    minutes: float = 60  # of the second stage
    tower_minutes: float = 4  # of the first
    lr: float = 5e-4
    warmup: int = 150
    decay: float = 0.3  # share of the time over which the learning rate falls to 0
    weight_decay: float = 0.02
    images: int = 15
    questions: int = 8
    seed: int = 0
    pass_mark: float = 0.9


@dataclass
class Progress:
    """Where a run stands; saved with the weights."""

    step: int = 0
    seconds: float = 0.0
    levels: dict[str, int] = field(default_factory=start_levels)
    running: dict[str, float] = field(default_factory=dict)  # domain -> running accuracy
    table: dict[str, float] = field(default_factory=dict)  # "domain category" -> running accuracy
    log: list[dict] = field(default_factory=list)
    seeing: tuple[float, int] = (0.0, 0)  # accuracy of the first stage, and its steps


def learning_rate(settings: Settings, step: int, seconds: float) -> float:
    """Warm-up by steps, constant, then linear to 0 over the last part of the time."""
    left = max(0.0, 1 - seconds / (60 * settings.minutes))
    return settings.lr * min(1.0, (step + 1) / settings.warmup) * min(1.0, left / settings.decay)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the device."""
    moved: dict[str, Any] = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(batch).items()}
    return Batch(**moved)


def train_step(model, batch: Batch) -> tuple[torch.Tensor, list[bool]]:
    """(loss, whether each first answer token was right)."""
    hidden = forward(model, batch)
    wanted = batch.targets != IGNORE
    logits = F.linear(hidden[wanted], model.lm_head.weight)
    targets, weights = batch.targets[wanted], batch.weights[wanted]
    loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
    right = torch.zeros_like(wanted)
    right[wanted] = logits.argmax(-1) == targets
    rows, positions = zip(*((row, at) for row, at, _, _ in batch.labels))
    return loss, right[list(rows), list(positions)].tolist()


def update(progress: Progress, batch: Batch, right: list[bool], pass_mark: float) -> None:
    """Running accuracies, and the next level for a domain that passes."""
    by_domain: dict[str, list[bool]] = {}
    by_kind: dict[str, list[bool]] = {}
    for ok, (_, _, domain, category) in zip(right, batch.labels):
        if category != "caption":
            by_domain.setdefault(domain, []).append(ok)
        by_kind.setdefault(f"{domain} {category}", []).append(ok)
    for table, seen, pace in ((progress.running, by_domain, 0.04), (progress.table, by_kind, 0.02)):
        for key, values in seen.items():
            mean = sum(values) / len(values)
            table[key] = table.get(key, 0.0) + pace * (mean - table.get(key, 0.0))
    for domain, accuracy in progress.running.items():
        if accuracy > pass_mark and raise_level(progress.levels, domain):
            progress.running[domain] = 0.6


def decaying_matrices(model: torch.nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that lets matrices decay, and norms and biases not."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def train(settings: Settings, state: Path = STATE, out: Path = CHECKPOINT, save_every: float = 120) -> Progress:
    """Trains for `settings.minutes`, going on from `state` where there is one, and saves to `out`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(settings.seed)
    rng = Random(settings.seed)
    tokenizer = build_tokenizer()
    model = Qwen2VLForConditionalGeneration(build_config(tokenizer)).to(device).train()  # pyright: ignore[reportArgumentType] (transformers' `to` is wrapped)
    _linear_patch_embed(model)
    optimizer = decaying_matrices(model, settings.weight_decay)
    progress = Progress()
    if not state.exists():
        progress.seeing = teach_tower(model, settings.seed, settings.tower_minutes)
        _save(state, model, optimizer, progress, rng)
    else:
        saved = torch.load(state, map_location=device, weights_only=False)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        progress = Progress(**saved["progress"])
        rng.setstate(saved["rng"])
        torch.set_rng_state(saved["torch_rng"].cpu())
    packer = Packer(tokenizer)
    began, last = time.monotonic() - progress.seconds, time.monotonic()
    bar = tqdm(total=round(60 * settings.minutes), initial=round(progress.seconds), unit="s", mininterval=10)
    while progress.seconds < 60 * settings.minutes:
        mix: dict[Any, float] = {tuple(k.split()): 0.4 + 3 * (1 - v) for k, v in progress.table.items()}  # more of what is hard
        early = sum(progress.levels.values()) < 10
        grid = rng.choice(CURRICULUM_GRIDS) if early and rng.random() < 0.8 else pick_grid(rng)
        batch = draw_batch(packer, rng, progress.levels, mix, grid, settings.images, settings.questions)
        batch = to_device(batch, device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, progress.step, progress.seconds)
        loss, right = train_step(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update(progress, batch, right, settings.pass_mark)
        progress.step += 1
        bar.update(round(time.monotonic() - began) - bar.n)
        progress.seconds = time.monotonic() - began
        if progress.step % 50 == 0:
            progress.log.append(
                {"step": progress.step, "seconds": round(progress.seconds), "loss": round(float(loss), 4),
                 "levels": dict(progress.levels), **{k: round(v, 3) for k, v in progress.running.items()}}
            )  # fmt: skip
            bar.set_postfix_str(_summary(progress, float(loss)))
        if time.monotonic() - last > save_every:
            _save(state, model, optimizer, progress, rng)
            save_folder(model, tokenizer, out)
            last = time.monotonic()
    bar.close()
    _save(state, model, optimizer, progress, rng)
    save_folder(model, tokenizer, out)
    (out / "training.json").write_text(
        json.dumps({"settings": asdict(settings), "steps": progress.step, "seconds": round(progress.seconds), "seeing": progress.seeing,
                    "threads": torch.get_num_threads(), "device": device.type, "log": progress.log}) + "\n"
    )  # fmt: skip
    return progress


def _summary(progress: Progress, loss: float) -> str:
    parts = [f"{d[:3]} {progress.levels[d]}:{a:.2f}" for d, a in progress.running.items()]
    return f"step {progress.step} loss {loss:.3f} " + " ".join(parts)


def _save(state: Path, model, optimizer, progress: Progress, rng: Random) -> None:
    about = {"progress": asdict(progress), "rng": rng.getstate(), "torch_rng": torch.get_rng_state()}
    with whole_file(state) as file:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), **about}, file)


def _linear_patch_embed(model) -> None:
    """The patch embedding as the matrix product it is: three times as fast on a CPU as the convolution."""
    embed = model.model.visual.patch_embed
    embed.forward = lambda pixels: F.linear(pixels, embed.proj.weight.flatten(1))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    defaults = Settings()
    for name, value in asdict(defaults).items():
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
