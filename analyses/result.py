"""Results on disk: one safetensors file each, with its tensors as they are and everything else in its header.

Nothing in a file is code: loading one made by somebody else runs nothing.
"""

from __future__ import annotations

import json
import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "hooked_qwen2vl result 1"


class Result:
    """What every analysis returns: a frozen dataclass that can be saved and loaded."""

    def save(self, path: str | Path) -> Path:
        """Writes the result; a file that is there is replaced when the new one is whole.

        Raises:
            ValueError: a field that is no tensor, number, text, or tuple, list, dictionary or result of these.
        """
        tensors: dict[str, Tensor] = {}
        header = {"format": FORMAT, "type": type(self).__name__, "value": json.dumps(_encode(self, tensors))}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, partial, header)
        os.replace(partial, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The result that `save` wrote.

        Raises:
            ValueError: no such file, not a result, or another kind of result.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, safe_open is no mapping
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read as a result ({error}): expected a file that save wrote.") from error
        if header.get("format") != FORMAT or header.get("type") != cls.__name__:
            found = header.get("type", "no result")
            raise ValueError(f"{path} holds {found}, not {cls.__name__}: load it with the class that saved it.")
        return _decode(json.loads(header["value"]), tensors)


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()  # no two fields may share storage in the file
        return {"tensor": name}
    if isinstance(value, Result) and is_dataclass(value):
        return {"result": type(value).__name__, "fields": {f.name: _encode(getattr(value, f.name), tensors) for f in fields(value)}}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__: [_encode(item, tensors) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_encode(key, tensors), _encode(item, tensors)] for key, item in value.items()]}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise ValueError(f"a result can hold tensors, numbers, text and collections of these, not {type(value).__name__}.")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "result" in value:
        kinds = {kind.__name__: kind for kind in Result.__subclasses__()}
        return kinds[value["result"]](**{name: _decode(item, tensors) for name, item in value["fields"].items()})
    if "dict" in value:
        return {_decode(key, tensors): _decode(item, tensors) for key, item in value["dict"]}
    kind, items = next(iter(value.items()))
    return {"tuple": tuple, "list": list}[kind](_decode(item, tensors) for item in items)
