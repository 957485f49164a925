"""A checkpoint (a folder or hub id) as a configuration and lazily read tensors.

Only JSON and safetensors are read, never pickles or code. Tensors are memory-mapped (copy-on-write) and read when first used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

from .files import open_regular

if TYPE_CHECKING:
    from torch import Tensor

SCENES = Path(__file__).parent / "scenes" / "checkpoint"

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WANTED = ["*.json", "*.safetensors", "*.txt", "*.jinja"]  # files to download: no *.bin, no *.py


@dataclass(frozen=True)
class Checkpoint(Mapping[str, "Tensor"]):
    """HF parameter name -> tensor, read on access.

    Attributes:
        folder: where the files are.
        name: as the user gave it.
        config: the parsed `config.json`.
        generation: the parsed `generation_config.json`, empty if there is none.
        files: HF parameter name -> its safetensors file.
        adapter: PEFT folder of an adapter to merge into these weights, or None.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    generation: dict[str, Any]
    files: dict[str, Path]
    adapter: Path | None = None

    def __post_init__(self):
        object.__setattr__(self, "_stamps", {path: _stamp(path) for path in set(self.files.values())})

    def _refuse_changed(self, path: Path) -> None:
        """Raises ValueError if a file has changed since it was opened; reading a mapped file that was cut short kills the process."""
        if not path.exists() or _stamp(path) != self._stamps[path]:  # pyright: ignore[reportAttributeAccessIssue] (set in __post_init__)
            raise ValueError(f"{path} has changed since it was opened: load the model again, and replace a checkpoint by a new folder.")

    def __getitem__(self, key: str) -> Tensor:
        self._refuse_changed(self.files[key])
        with _open(self.files[key]) as file:
            return file.get_tensor(key)

    def items(self) -> Iterator[tuple[str, Tensor]]:  # opens each shard once
        for path in dict.fromkeys(self.files.values()):
            self._refuse_changed(path)
            with _open(path) as file:
                for key in file.keys():  # noqa: SIM118, an open file is no mapping
                    yield key, file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def open_checkpoint(
    name: str | Path, revision: str | None = None, local_files_only: bool = False, adapter: str | Path | bool | None = None
) -> Checkpoint:
    """Finds a checkpoint and lists its tensors without reading them.

    An adapter in the folder is used, as in transformers: on the folder's own weights if it has a config.json, else on the base
    that `adapter_config.json` names.

    Args:
        name: "scenes" (the embedded model), a folder, or a hub id; an existing folder has precedence over a hub id.
        revision: branch, tag or commit of a hub id.
        local_files_only: look only in the hub's local cache.
        adapter: a PEFT folder or hub id; False: do not use the adapter in the folder.
    Raises:
        ValueError: no such checkpoint, no network for a hub id, a missing or truncated shard, a tensor in the wrong shard, only
            pickled weights, two adapters, or an adapter that is not a LoRA.
    """
    folder = _find(str(name), revision, local_files_only)
    folder, adapter = _with_adapter(folder, revision, local_files_only, adapter)
    _refuse_other_formats(folder)
    config = _read_json(folder / "config.json", "the model's configuration")
    settings = folder / "generation_config.json"
    generation = _read_json(settings, "how it ends an answer") if settings.exists() else {}
    return Checkpoint(folder, str(name), config, generation, _list_tensors(folder), adapter)


def _with_adapter(
    folder: Path, revision: str | None, local_files_only: bool, adapter: str | Path | bool | None
) -> tuple[Path, Path | None]:
    """(folder of the base, folder of its adapter or None)."""
    whole, own = (folder / "config.json").exists(), (folder / ADAPTER_CONFIG).exists()
    if adapter is True or (adapter is False and own and not whole):
        raise ValueError(
            f"adapter={adapter} with {folder}: expected a PEFT folder or hub id, None, or (for a folder with weights of its own) False."
        )
    if not own and (folder / ADAPTER_WEIGHTS).exists() and adapter is not False:
        raise ValueError(
            f"{folder} has {ADAPTER_WEIGHTS} but no {ADAPTER_CONFIG}, which says how to apply it: add it, or pass adapter=False."
        )
    if not own or adapter is False:
        if adapter in (None, False):
            return folder, None
        tuned = _find(str(adapter), None, local_files_only)
        _read_adapter(tuned)
        return folder, tuned
    if adapter is not None:
        raise ValueError(
            f"{folder} has an adapter of its own ({ADAPTER_CONFIG}), and adapter={str(adapter)!r} is another: transformers would apply both. "
            f"Pass one: the folder by itself, or the base and adapter=."
        )
    settings = _read_adapter(folder)
    if whole:
        return folder, folder
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{folder / ADAPTER_CONFIG} names no base model: pass from_pretrained(base, adapter={str(folder)!r}).")
    try:
        base_folder = _find(base, settings.get("revision"), local_files_only)
    except ValueError as error:
        raise ValueError(
            f"{folder} is an adapter of {base!r} (base_model_name_or_path), which could not be found; pass "
            f"from_pretrained(base, adapter={str(folder)!r}). {error}"
        ) from error
    if (base_folder / ADAPTER_CONFIG).exists():
        raise ValueError(f"{folder} is an adapter of {base!r}, which has an adapter itself: merge that one first.")
    return base_folder, folder


def _read_adapter(folder: Path) -> dict[str, Any]:
    """The parsed `adapter_config.json` of a folder whose adapter can be merged.

    Raises:
        ValueError: no such file or weights, only pickled weights, or an adapter that is not a LoRA.
    """
    if not (folder / ADAPTER_CONFIG).exists():
        raise ValueError(f"{folder} has no {ADAPTER_CONFIG}: expected a folder that peft's save_pretrained wrote.")
    settings = _read_json(folder / ADAPTER_CONFIG, "how the adapter is applied")
    refuse_other_adapters(settings.get("peft_type"), str(folder))
    if settings.get("alora_invocation_tokens"):
        raise ValueError(f"{folder} is an activated LoRA (alora_invocation_tokens): it acts on some positions only and cannot be merged.")
    if not (folder / ADAPTER_WEIGHTS).exists():
        pickled = (folder / "adapter_model.bin").exists()
        raise ValueError(
            f"{folder} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}"
            + (": adapter_model.bin is a pickle, which is never opened; save it with safe_serialization=True." if pickled else ".")
        )
    return settings


def refuse_other_adapters(kind: Any, where: str) -> None:
    """Raises ValueError for an adapter whose type (peft's `peft_type`) is not LoRA."""
    if kind != "LORA":
        raise ValueError(
            f"{where} is an adapter of type {str(kind)!r}: only 'LORA' can be merged into plain weights here. Merge it with peft "
            f"(merge_and_unload()) if its type can be, and load the merged model."
        )


def local_checkpoint(name: str) -> Path | None:
    """The folder of a checkpoint that is here ("scenes", or a path), or None for an id of the hub.

    Raises:
        ValueError: a path where there is no folder, or a text that is neither.
    """
    if name == "scenes":
        return SCENES
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder
    if folder.suffix == ".gguf" and folder.exists():
        raise ValueError(f"{name} is a file of GGUF weights: load the folder of the checkpoint that it was converted from.")
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(
            f"no checkpoint at {name!r}: expected 'scenes', a folder with config.json and *.safetensors, or a hub id "
            f"such as 'Qwen/Qwen2-VL-2B-Instruct'."
        )
    return None


def _find(name: str, revision: str | None, local_files_only: bool) -> Path:
    if (folder := local_checkpoint(name)) is not None:
        return folder
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=local_files_only, allow_patterns=WANTED))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError, ValueError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ValueError(
            f"{name!r}{at} is not a folder here and could not be had from the hub ({_first_line(error)}). "
            f"Check the name and the network, give a local folder, or download it once with "
            f"`hf download {name}`; `from_pretrained('scenes')` needs no network."
        ) from error


# Other formats of weights: (pattern, what it is, what to do).
_FORMATS = (
    ("*.gguf", "GGUF weights", "load the checkpoint that they were converted from"),
    ("*.distcp", "shards of torch's distributed checkpoints (FSDP)", "merge them with `accelerate merge-weights`"),
    ("pytorch_model_fsdp_*/*.distcp", "shards of torch's distributed checkpoints (FSDP)", "merge them with `accelerate merge-weights`"),
    ("pytorch_model_fsdp*", "an FSDP checkpoint", "merge it with `accelerate merge-weights`"),
    ("*zero_pp_rank*", "shards of DeepSpeed ZeRO", "merge them with its zero_to_fp32.py"),
    ("global_step*/*", "shards of DeepSpeed ZeRO", "merge them with its zero_to_fp32.py"),
    ("zero_to_fp32.py", "shards of DeepSpeed ZeRO", "merge them with its zero_to_fp32.py"),
    ("*.bin", "only pickled weights, which are never opened", "convert it with transformers' save_pretrained"),
    ("*.pt", "only pickled weights, which are never opened", "convert it with transformers' save_pretrained"),
    ("*.pth", "only pickled weights, which are never opened", "convert it with transformers' save_pretrained"),
    ("*.ckpt", "only pickled weights, which are never opened", "convert it with transformers' save_pretrained"),
    ("*.h5", "TensorFlow weights", "convert it with transformers' save_pretrained"),
    ("*.msgpack", "Flax weights", "convert it with transformers' save_pretrained"),
)


def _refuse_other_formats(folder: Path) -> None:
    """Raises ValueError for a folder without model.safetensors or an index; the message says what weights it has."""
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        return
    expected = f"expected {SINGLE} or {INDEX} with its shards"
    for pattern, what, way_out in _FORMATS:
        if found := sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern)):
            names = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
            raise ValueError(f"{folder} holds {what} ({names}): {expected}; {way_out}.")
    if found := sorted(path.name for path in folder.glob("*.safetensors") if path.name != ADAPTER_WEIGHTS):
        raise ValueError(f"{folder} holds {', '.join(found[:3])}, and no {INDEX} that says what is in them: {expected}.")
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no weights: {expected}.")


def _list_tensors(folder: Path) -> dict[str, Path]:
    """HF name -> file; model.safetensors has precedence over an index, as in transformers."""
    index = folder / INDEX
    if not (folder / SINGLE).exists():
        weight_map = _read_json(index, "the list of shards").get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no 'weight_map': expected an index written by transformers.")
        if outside := [shard for shard in weight_map.values() if not _is_inside(shard)]:
            raise ValueError(f"{index} names {ascii(outside[0])[:200]} as a shard: expected files of its own folder.")
        shards = sorted(set(weight_map.values()))
        absent = [shard for shard in shards if not (folder / shard).exists()]
        if absent:
            raise ValueError(
                f"{index} lists {len(shards)} shards but lacks {', '.join(absent[:3])}"
                f"{f' and {len(absent) - 3} more' if len(absent) > 3 else ''}: download them, or remove an index of other files."
            )
        paths = [folder / shard for shard in shards]
    else:
        weight_map, paths = None, [folder / SINGLE]
    files = {key: path for path in paths for key in _keys(path)}
    if weight_map is not None:
        wrong = [k for k, shard in weight_map.items() if files.get(k) != folder / shard] + [k for k in files if k not in weight_map]
        if wrong:
            more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise ValueError(f"{index} does not describe its shards: {', '.join(sorted(wrong)[:10])}{more}; download it anew.")
    return files


def _is_inside(shard: Any) -> bool:
    """Whether an entry of an index is the name of a file inside the folder."""
    return (
        isinstance(shard, str)
        and bool(shard)
        and "\0" not in shard
        and not PurePath(shard).is_absolute()
        and ".." not in PurePath(shard).parts
    )


def _stamp(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def _keys(path: Path) -> list[str]:
    with _open(path) as file:
        return list(file.keys())


def _open(path: Path):
    if path.exists() and not path.is_file():
        open_regular(path)  # says what it is
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            pointer = file.read(40).startswith(b"version https://git-lfs")
        if pointer:
            raise ValueError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in {path.parent}.") from error
        raise ValueError(
            f"{path} is not a whole safetensors file ({_first_line(error)}; it has {path.stat().st_size} bytes): download it again."
        ) from error


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            content = json.loads(file.read().decode("utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} has no {path.name} ({what}): is it a Qwen2-VL folder?") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} ({what}) is not JSON: {error}.") from error
    except (RecursionError, OSError) as error:
        why = "brackets are nested too deep" if isinstance(error, RecursionError) else error.strerror
        raise ValueError(f"{path} ({what}) cannot be read: {why}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} ({what}) is not a JSON object.")
    return content


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
