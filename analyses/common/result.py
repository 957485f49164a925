"""Results on disk: one safetensors file each, with its tensors as they are and everything else in its header.

Nothing in a file is code: loading one made by somebody else runs nothing. A table keeps its columns' types; an image its
pixels, losslessly; a prompt everything but its vision prefix, which is computed again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooked_qwen2vl.inputs import Inputs, Visual

FORMAT = "hooked_qwen2vl result 1"


class Result:
    """What every analysis returns: a frozen dataclass that can be saved and loaded."""

    def save(self, path: str | Path) -> Path:
        """Writes the result; a file that is there is replaced when the new one is whole.

        Raises:
            ValueError: a field that is no tensor, number, text, table, image, prompt, or tuple, list, dictionary or result
                of these.
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
    if isinstance(value, Inputs):
        value = replace(value, image_embeds=None, encoded_by=None)  # named after the weights of this process
    if isinstance(value, (Result, Inputs, Visual)) and is_dataclass(value):
        return {"result": type(value).__name__, "fields": {f.name: _encode(getattr(value, f.name), tensors) for f in fields(value)}}
    if isinstance(value, pd.DataFrame):
        return {"table": _encode_table(value, tensors)}
    if isinstance(value, Image.Image):
        value = value.convert("RGBA") if value.mode in ("P", "PA") else value  # a palette's numbers are of no use without it
        pixels = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8)
        return {"image": _encode(pixels, tensors), "mode": value.mode, "size": value.size}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, (tuple, list)):
        return {"tuple" if isinstance(value, tuple) else "list": [_encode(item, tensors) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": [[_encode(key, tensors), _encode(item, tensors)] for key, item in value.items()]}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise ValueError(
        f"a result can hold tensors, numbers, text, tables, images, prompts and collections of these, not {type(value).__name__}."
    )


def _encode_table(table: pd.DataFrame, tensors: dict[str, Tensor]) -> dict[str, Any]:
    counted = isinstance(table.index, pd.RangeIndex) and table.index.equals(pd.RangeIndex(len(table)))
    columns = []
    for number, name in enumerate(table.columns):
        column = table.iloc[:, number]
        if column.dtype.kind in "biuf" and isinstance(column.dtype, np.dtype):
            values = _encode(torch.from_numpy(column.to_numpy(copy=True)), tensors)
        elif column.dtype in (object, "str"):
            values = [_encode(value, tensors) for value in column.tolist()]
        else:
            raise ValueError(f"a table's columns can hold numbers and text, but {name!r} is of type {column.dtype}.")
        columns.append([_encode(name, tensors), str(column.dtype), values])
    index = None if counted else _encode(table.index.tolist(), tensors)
    return {"columns": columns, "index": index, "index_name": table.index.name, "rows": len(table)}


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "result" in value:
        kinds = {kind.__name__: kind for kind in (*_kinds(Result), Inputs, Visual)}
        return kinds[value["result"]](**{name: _decode(item, tensors) for name, item in value["fields"].items()})
    if "table" in value:
        return _decode_table(value["table"], tensors)
    if "image" in value:
        return Image.frombytes(value["mode"], tuple(value["size"]), _decode(value["image"], tensors).numpy().tobytes())
    if "path" in value:
        return Path(value["path"])
    if "dict" in value:
        return {_decode(key, tensors): _decode(item, tensors) for key, item in value["dict"]}
    kind, items = next(iter(value.items()))
    return {"tuple": tuple, "list": list}[kind](_decode(item, tensors) for item in items)


def _decode_table(about: dict[str, Any], tensors: dict[str, Tensor]) -> pd.DataFrame:
    index = pd.RangeIndex(about["rows"]) if about["index"] is None else pd.Index(_decode(about["index"], tensors))
    columns = []
    for _, kind, values in about["columns"]:
        found = _decode(values, tensors).numpy() if isinstance(values, dict) else [_decode(value, tensors) for value in values]
        columns.append(pd.Series(found, index=index, dtype=kind))
    if not columns:
        return pd.DataFrame(index=index)
    table = pd.concat(columns, axis=1)
    table.columns = [_decode(name, tensors) for name, _, _ in about["columns"]]
    return table.rename_axis(index=about["index_name"])


def _kinds(kind: type) -> Iterator[type]:
    """All that is derived from a class, by however many steps."""
    for derived in kind.__subclasses__():
        yield derived
        yield from _kinds(derived)
