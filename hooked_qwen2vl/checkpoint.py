"""A Qwen2-VL folder or hub id, as a configuration and lazily read tensors.

Only JSON and safetensors are read; never pickle, never code from a checkpoint. A tensor's numbers are
mapped from the file (copy-on-write) and read when first used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from torch import Tensor

SCENES = Path(__file__).parent / "scenes" / "checkpoint"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
WANTED = ["*.json", "*.safetensors", "*.txt", "*.jinja"]  # no *.bin, no *.py


@dataclass(frozen=True)
class Checkpoint(Mapping[str, Tensor]):
    """HF parameter name -> tensor, read on access.

    Attributes:
        folder: where the files are.
        name: what the user called it.
        config: the parsed `config.json`.
        generation: the parsed `generation_config.json`, empty where there is none.
        files: HF parameter name -> the safetensors file that holds it.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    generation: dict[str, Any]
    files: dict[str, Path]

    def __getitem__(self, key: str) -> Tensor:
        with _open(self.files[key]) as file:
            return file.get_tensor(key)

    def items(self) -> Iterator[tuple[str, Tensor]]:  # one open file a shard, not one a tensor
        for path in dict.fromkeys(self.files.values()):
            with _open(path) as file:
                for key in file.keys():  # noqa: SIM118, an open file is no mapping
                    yield key, file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def open_checkpoint(name: str | Path, revision: str | None = None, local_files_only: bool = False) -> Checkpoint:
    """Finds a checkpoint and lists its tensors, reading none.

    Args:
        name: "scenes" (the embedded model), a folder, or a hub id; a folder of that name wins.
        revision: branch, tag or commit of a hub id.
        local_files_only: look only in the hub's local cache.
    Raises:
        ValueError: nothing there, no network for a hub id, a shard missing or truncated, a tensor in
            the wrong shard, or weights in pickle form only.
    """
    folder = _find(str(name), revision, local_files_only)
    config = _read_json(folder / "config.json", "the model's configuration")
    settings = folder / "generation_config.json"
    generation = _read_json(settings, "how it ends an answer") if settings.exists() else {}
    return Checkpoint(folder, str(name), config, generation, _list_tensors(folder))


def _find(name: str, revision: str | None, local_files_only: bool) -> Path:
    if name == "scenes":
        return SCENES
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(
            f"no checkpoint at {name!r}: expected 'scenes', a folder with config.json and *.safetensors, or a hub id "
            f"such as 'Qwen/Qwen2-VL-2B-Instruct'."
        )
    try:
        return Path(
            snapshot_download(name, revision=revision, local_files_only=local_files_only, allow_patterns=WANTED)
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError, ValueError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ValueError(
            f"{name!r}{at} is not a folder here and could not be had from the hub ({_first_line(error)}). "
            f"Check the name and the network, give a local folder, or download it once with "
            f"`hf download {name}`; `from_pretrained('scenes')` needs no network."
        ) from error


def _list_tensors(folder: Path) -> dict[str, Path]:
    index = folder / INDEX
    if index.exists():
        weight_map = _read_json(index, "the list of shards").get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no 'weight_map': expected an index written by transformers.")
        shards = sorted(set(weight_map.values()))
        absent = [shard for shard in shards if not (folder / shard).exists()]
        if absent:
            raise ValueError(
                f"{folder} lists {len(shards)} shards but lacks {', '.join(absent)}: download the missing files."
            )
        paths = [folder / shard for shard in shards]
    elif (folder / SINGLE).exists():
        weight_map, paths = None, [folder / SINGLE]
    else:
        pickled = [path.name for path in folder.glob("*.bin")]
        why = f"only pickled weights ({', '.join(pickled)}), which are never opened" if pickled else "no weights"
        raise ValueError(
            f"{folder} holds {why}: expected {SINGLE} or {INDEX} with its shards; convert it with transformers' "
            f"save_pretrained."
        )
    files = {key: path for path in paths for key in _keys(path)}
    if weight_map is not None:
        wrong = [k for k, shard in weight_map.items() if files.get(k) != folder / shard] + [
            k for k in files if k not in weight_map
        ]
        if wrong:
            raise ValueError(f"{index} does not describe its shards: {', '.join(sorted(wrong))}; download it anew.")
    return files


def _keys(path: Path) -> list[str]:
    with _open(path) as file:
        return list(file.keys())


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({_first_line(error)}; it has {path.stat().st_size} bytes): "
            f"download it again."
        ) from error


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} has no {path.name} ({what}): is it a Qwen2-VL folder?") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} ({what}) is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} ({what}) is not a JSON object.")
    return content


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
