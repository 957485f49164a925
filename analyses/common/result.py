"""Results on disk: one safetensors file per result. The fields are JSON in its header; these are stored as tensors:

    tensors   as they are
    tables    the bytes of a Parquet file
    images    the bytes of a PNG file, or the raw pixels if PNG does not support the image's mode
    prompts   all fields but the image embeddings, which are computed again after loading

Loading runs no code from a file and imports no module that a file names: a class is looked up, by module and name, among the
classes that are imported already.
"""

from __future__ import annotations

import html
import io
import json
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

from hooked_qwen2vl.files import open_regular, whole_file
from hooked_qwen2vl.inputs import Inputs, Visual
from hooked_qwen2vl.moved import current_fields, current_path, renamed_columns
from hooked_qwen2vl.version import __version__

FORMAT = "hooked_qwen2vl result 2"
_BEFORE = {"hooked_qwen2vl result 1": "0.1"}  # earlier formats -> the last version that reads them


class Result:
    """Base class of what analyses return: frozen dataclasses that can be saved and loaded; notebooks show them as tables."""

    def _repr_html_(self) -> str:
        """HTML with the class name, a summary of each field, and the first 5 rows of `to_dataframe()`."""
        rows = "".join(
            f"<tr><th style='text-align:left'>{field.name}</th><td style='text-align:left'>{html.escape(_brief(getattr(self, field.name)))}</td></tr>"
            for field in fields(self)  # type: ignore[arg-type]
        )
        table = getattr(self, "to_dataframe", pd.DataFrame)()
        shown = (
            table.head(5).to_html(index=False, max_cols=12, border=0, float_format=lambda x: f"{x:.3g}", na_rep="") if len(table) else ""
        )
        more = f"<p>the first 5 of {len(table)} rows of to_dataframe()</p>" if len(table) > 5 else ""
        return f"<p><b>{type(self).__name__}</b></p><details><summary>fields</summary><table>{rows}</table></details>{shown}{more}"

    def save(self, path: str | Path) -> Path:
        """Writes the result to a file; an existing file is replaced only when the new one is complete.

        Raises:
            ValueError: a field is not a tensor, number, text, table, image or prompt, or a tuple, list, dictionary or result of these.
        """
        tensors: dict[str, Tensor] = {}
        value = json.dumps(_encode(self, tensors))
        header = {"format": FORMAT, "version": __version__, "type": _name(type(self)), "value": value}
        with whole_file(path) as file:
            save_file(tensors, file, header)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a result that `save` wrote.

        Raises:
            ValueError: no such file, not the file of a result, a damaged file, a result of another class, or a format or fields
                that this version does not read.
        """
        try:
            open_regular(path).close()
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, safe_open is no mapping
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as a result ({str(error).rstrip('.')}): expected a file that save wrote.") from error
        _check_format(path, header)
        found, wanted = _current(header.get("type", "")), _name(cls)
        if found != wanted:
            short = [name.partition(":")[2] for name in (found, wanted)]
            found, wanted = short if short[0] != short[1] else (found, wanted)
            raise ValueError(f"{path} holds {found}, not {wanted}: load it with the class that saved it.")
        try:
            return _decode(json.loads(header["value"]), tensors)
        except _Unknown as error:
            raise ValueError(f"{path}, written by hooked_qwen2vl {header.get('version')}: {error}") from error
        except MemoryError:
            raise
        except Exception as error:  # a damaged header can raise anything
            why = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{path} cannot be read as a result ({type(error).__name__}: {why}): it is damaged, compute it again."
            ) from error


class _Unknown(Exception):
    """A file names a class that is not imported or whose fields have changed."""


def _brief(value: Any) -> str:
    """A summary of a value in at most 80 characters: dtype and shape of a tensor, length of a sequence."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, pd.DataFrame):
        return f"table, {len(value)} rows × {len(value.columns)} columns"
    if isinstance(value, dict):
        return f"{len(value)} entries: {', '.join(map(str, value))}"[:80]
    if is_dataclass(value):
        return type(value).__name__
    if isinstance(value, (tuple, list)):
        return f"{len(value)} entries" if len(value) > 4 else "; ".join(map(_brief, value))[:80]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _check_format(path: str | Path, header: Mapping[str, str]) -> None:
    found = header.get("format", "")
    if found == FORMAT:
        return
    if found in _BEFORE:
        version = _BEFORE[found]
        raise ValueError(
            f"{path} was written by hooked_qwen2vl {version} ({found}), whose definitions differ; this is {__version__}, which reads "
            f"{FORMAT}. Compute it again with this version, or read it with hooked_qwen2vl {version}."
        )
    if found.startswith("hooked_qwen2vl result "):
        raise ValueError(
            f"{path} was written by hooked_qwen2vl {header.get('version')} ({found}); this is {__version__}, which reads {FORMAT}. "
            f"Read it with that version."
        )
    raise ValueError(f"{path} holds no result: expected a file that save wrote.")


# ---- values -----------------------------------------------------------------------------------------


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()  # safetensors refuses tensors that share storage
        return {"tensor": name}
    if isinstance(value, Inputs):
        value = replace(value, image_embeds=None, deepstack_embeds=None, encoded_by=None)  # encoded_by is valid in this process only
    if isinstance(value, (Result, Inputs, Visual)) and is_dataclass(value):
        encoded = {f.name: _encode(getattr(value, f.name), tensors) for f in fields(value)}
        return {"class": _name(type(value)), "fields": encoded}
    if isinstance(value, pd.DataFrame):
        return {"table": _encode_table(value, tensors)}
    if isinstance(value, Image.Image):
        return {"image": _encode_image(value, tensors)}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {"class": _name(type(value)), "fields": {name: _encode(item, tensors) for name, item in value._asdict().items()}}  # pyright: ignore[reportAttributeAccessIssue] (a named tuple)
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


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "class" in value:
        return _decode_class(value, tensors)
    if "table" in value:
        return _decode_table(value["table"], tensors)
    if "image" in value:
        return _decode_image(value["image"], tensors)
    if "path" in value:
        return Path(value["path"])
    if "dict" in value:
        return {_decode(key, tensors): _decode(item, tensors) for key, item in value["dict"]}
    kind, items = next(iter(value.items()))
    return {"tuple": tuple, "list": list}[kind](_decode(item, tensors) for item in items)


def _bytes(content: bytes, tensors: dict[str, Tensor]) -> dict[str, str]:
    return _encode(torch.frombuffer(bytearray(content), dtype=torch.uint8), tensors)


# ---- classes ----------------------------------------------------------------------------------------


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _current(name: str) -> str:
    """The current name of a class whose module may have been moved since the file was written."""
    module, _, qualname = name.partition(":")
    return f"{current_path(module)}:{qualname}"


def _decode_class(value: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    name = _current(value["class"])
    kinds = {_name(kind): kind for kind in (*_derived(Result), Inputs, Visual, *_derived(tuple))}
    if name not in kinds:
        raise _Unknown(f"there is no class {name}; import the module that defines it first.")
    kind, stored = kinds[name], current_fields(name, value["fields"])
    expected = [f.name for f in fields(kind)] if is_dataclass(kind) else list(kind._fields)
    if set(stored) != set(expected):
        raise _Unknown(f"{name} had the fields {', '.join(value['fields'])}, and has {', '.join(expected)} now. Compute the result again.")
    decoded = {field: _decode(item, tensors) for field, item in stored.items()}
    columns = renamed_columns(kind)
    return kind(**{f: v.rename(columns=columns) if columns and isinstance(v, pd.DataFrame) else v for f, v in decoded.items()})


def _derived(kind: type) -> Iterator[type]:
    """All subclasses of a class, direct and indirect."""
    for derived in kind.__subclasses__():
        yield derived
        yield from _derived(derived)


# ---- tables -----------------------------------------------------------------------------------------


def _encode_table(table: pd.DataFrame, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A table as Parquet bytes, with its column names apart (they need not be text); object columns are stored as JSON texts."""
    plain, mixed = table.copy(), []
    plain.columns = [str(number) for number in range(table.shape[1])]
    for name, (label, dtype) in zip(plain.columns, table.dtypes.items()):
        if dtype == np.dtype(object):
            mixed.append(name)
            plain[name] = pd.Series([json.dumps(_encode(cell, tensors)) for cell in plain[name]], index=plain.index, dtype="str")
        elif dtype != "str" and not (isinstance(dtype, np.dtype) and dtype.kind in "biuf"):
            raise ValueError(f"a table's columns can hold numbers and text, but {label!r} is of type {dtype}.")
    counted = isinstance(table.columns, pd.RangeIndex) and table.columns.equals(pd.RangeIndex(table.shape[1]))
    columns = table.shape[1] if counted else [_encode(label, tensors) for label in table.columns]
    names = [_encode(name, tensors) for name in table.columns.names]
    return {"parquet": _bytes(plain.to_parquet(), tensors), "columns": columns, "names": names, "mixed": mixed}


def _decode_table(about: dict[str, Any], tensors: dict[str, Tensor]) -> pd.DataFrame:
    table = pd.read_parquet(io.BytesIO(_decode(about["parquet"], tensors).numpy().tobytes()))
    for name in about["mixed"]:
        cells = [_decode(json.loads(cell), tensors) for cell in table[name]]
        table[name] = pd.Series(cells, index=table.index, dtype=object)
    columns = about["columns"]
    table.columns = pd.RangeIndex(columns) if isinstance(columns, int) else pd.Index([_decode(label, tensors) for label in columns])
    table.columns.names = [_decode(name, tensors) for name in about["names"]]
    return table


# ---- images -----------------------------------------------------------------------------------------


def _encode_image(image: Image.Image, tensors: dict[str, Tensor]) -> dict[str, Any]:
    png = _as_png(image)
    if png is not None:
        return {"png": _bytes(png, tensors)}
    if image.palette is not None or "transparency" in image.info:
        raise ValueError(
            f"an image of mode {image.mode} with this palette or transparency cannot be kept as it is: convert it first, with "
            f'image.convert("RGBA").'
        )
    return {"pixels": _bytes(image.tobytes(), tensors), "mode": image.mode, "size": image.size}


def _as_png(image: Image.Image) -> bytes | None:
    """PNG bytes, or None if reading them would give another mode, palette, transparency or other pixels."""
    file = io.BytesIO()
    try:
        image.save(file, "PNG")
    except (OSError, ValueError):  # no such mode in PNG
        return None
    again = Image.open(io.BytesIO(file.getvalue()))
    kept = [(one.tobytes(), one.mode, one.size, one.getpalette(), one.info.get("transparency")) for one in (image, again)]
    return file.getvalue() if kept[0] == kept[1] else None


def _decode_image(about: dict[str, Any], tensors: dict[str, Tensor]) -> Image.Image:
    if "png" in about:
        return Image.open(io.BytesIO(_decode(about["png"], tensors).numpy().tobytes())).copy()  # loads the pixels
    return Image.frombytes(about["mode"], tuple(about["size"]), _decode(about["pixels"], tensors).numpy().tobytes())
