"""A pretended GPU: tensors that say cuda:0, hold CPU data, and refuse to be mixed with CPU ones as CUDA does.

    with pretended(float64=False) as device:
        model = on_device(HookedQwen2VL.from_hf(...))   # its weights now "are" on cuda:0
        model(model.to_inputs(...))
    device.transfers["_local_scalar_dense"]             # how often the host waited for a number

Needs no CUDA build of torch. Whatever CUDA or MPS would refuse is an error here: tensors, indices or generators of two
devices (`MixedDevices`), `.numpy()` on the device, and, if asked for, float64 (`NoFloat64`, as on MPS). The numbers are the
CPU's own, so results can be compared with a run without it. Not covered: backward passes, kernels, several GPUs. Older releases of
torch ask for a driver: `needs_torch` marks the tests.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

CUDA = torch.device("cuda:0")
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
_COPYING = ("copy_", "_to_copy", "_local_scalar_dense", "copy")
_SCALARS_FROM_HOST = ("where", "masked_fill", "masked_fill_", "add", "mul", "sub", "div", "fill_", "fill")  # 0-d CPU tensors may come in
_MATMUL = ("mm", "bmm", "addmm", "mv", "dot", "baddbmm", "addmv")  # CUDA has none for integers
_SHAPE_FROM_DATA = (
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "repeat_interleave",
    "equal",
)  # the host waits for the size
_active: list[Pretence] = []


class MixedDevices(RuntimeError):
    """Two devices met in one operation."""


class NoFloat64(TypeError):
    """float64 on a device that has none."""


class OnDevice(Tensor):
    """A tensor that says it is on cuda:0; `held` is its data, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, layout=held.layout,
            device=CUDA, requires_grad=held.requires_grad,
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (Tensor.numpy, Tensor.__array__):
            raise MixedDevices(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
            )
        if func is Tensor.tolist:
            _active[-1].transfers["tolist"] += 1
            return held(args[0]).tolist()
        if func in (Tensor.data_ptr, Tensor.untyped_storage):
            return func(held(args[0]))
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            return _indexed(*args)
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        except RuntimeError as error:
            if "not linked with support for cuda" not in str(error):
                raise
            return _by_hand(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"


def held(value: Any) -> Any:
    return value.held if isinstance(value, OnDevice) else value


def on_device(tensor_or_module: Any) -> Any:
    """A tensor, or a module with all its weights (shared ones stay shared), on the pretended device."""
    if isinstance(tensor_or_module, Tensor):
        if _active and not _active[-1].float64 and tensor_or_module.dtype in (torch.float64, torch.complex128):
            raise NoFloat64("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
        return OnDevice(tensor_or_module)
    moved: dict[int, torch.nn.Parameter] = {}
    for module in tensor_or_module.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                new = moved.setdefault(id(weight), torch.nn.Parameter(OnDevice(weight.detach()), requires_grad=weight.requires_grad))
                module._parameters[name] = new
        module._buffers.update({name: OnDevice(value) for name, value in module._buffers.items() if value is not None})
    if hasattr(tensor_or_module, "_follow_weights"):
        tensor_or_module._follow_weights()
    return tensor_or_module


class Pretence(TorchDispatchMode):
    """What happens under the pretended device.

    Attributes:
        float64: whether the device has it.
        operations: operation -> how often it ran on the device.
        transfers: operation -> how often the host waited for the device's data.
    """

    def __init__(self, float64: bool = True):
        super().__init__()
        self.float64 = float64
        self.operations: collections.Counter[str] = collections.Counter()
        self.transfers: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


needs_torch = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="before torch 2.13 a device cannot be pretended without a driver"
)


@contextmanager
def pretended(float64: bool = True) -> Iterator[Pretence]:
    """Within it torch has a device cuda:0, on which only `on_device` and `.to("cuda")` put tensors."""
    torch._C._ensureCUDADeviceGuardSet()  # does nothing in a CPU build
    _device_constructors()  # torch remembers, at its first use, which functions `with torch.device(...)` is for: before we replace some
    mode = Pretence(float64)
    replaced = {  # each by a function of its own: torch.compile's tables refuse one that stands for two
        (torch.cuda, "_lazy_init"): lambda: None,
        (torch.cuda, "get_rng_state"): lambda device="cuda": torch.get_rng_state(),
        (torch.cuda, "set_rng_state"): lambda state, device="cuda": None,
        (torch.cuda, "manual_seed_all"): lambda seed: None,
        (Tensor, "to"): _moved(Tensor.to),
        (Tensor, "cuda"): lambda tensor, *args: tensor.to(CUDA),
        (torch, "tensor"): _made_by(torch.tensor),
        (torch, "as_tensor"): _made_by(torch.as_tensor),
    }
    patches = [patch.object(owner, name, new) for (owner, name), new in replaced.items()]
    for one in patches:
        one.start()
    _active.append(mode)
    try:
        with mode:
            yield mode
    finally:
        _active.pop()
        for one in patches:
            one.stop()


def _moved(to: Callable) -> Callable:
    """`Tensor.to`, which a CPU build refuses for a tensor on the CPU."""

    def moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(tensor, OnDevice):
            return to(tensor, *args, **kwargs)
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        return to(tensor, *args, **kwargs) if not _is_cuda(device) else on_device(to(tensor, dtype=dtype or tensor.dtype))

    return moved


def _made_by(make: Callable) -> Callable:
    """torch.tensor and torch.as_tensor: made on the CPU and carried over, as a CPU build cannot make them elsewhere."""

    def made(data, dtype=None, device=None, **kwargs):
        if isinstance(data, Tensor) and make.__name__ == "as_tensor":
            return data.to(device=device, dtype=dtype) if (device, dtype) != (None, None) else data
        device = CUDA if device is None and isinstance(data, OnDevice) else device
        data = [value.item() if isinstance(value, OnDevice) else value for value in data] if isinstance(data, (list, tuple)) else held(data)
        value = make(data, dtype=dtype, **kwargs)
        return on_device(value) if _is_cuda(device) else value

    return made


def _mapped(change: Callable, value: Any) -> Any:
    """An operation's arguments or results, which are flat but for lists of tensors, with each leaf changed."""
    if isinstance(value, (tuple, list)):
        return type(value)([_mapped(change, part) for part in value]) if type(value) in (tuple, list) else value
    return {key: _mapped(change, part) for key, part in value.items()} if type(value) is dict else change(value)


def _leaves(args: tuple, kwargs: dict) -> list[Any]:
    found: list[Any] = []
    _mapped(found.append, (args, kwargs))
    return found


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _indexed(tensor: Tensor, index: Any, *value: Any) -> Tensor | None:
    """Indexing, on the held data: a CPU build has no way to index a tensor of another device."""
    parts = index if isinstance(index, tuple) else (index,)
    on = isinstance(tensor, OnDevice)
    if not on and any(isinstance(part, OnDevice) for part in parts):
        raise MixedDevices("indices should be either on cpu or on the same device as the indexed tensor (cpu).")
    if value and isinstance(value[0], Tensor) and value[0].ndim and isinstance(value[0], OnDevice) != on:
        raise MixedDevices("a value on one device is written into a tensor on another.")
    if any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts) and on:
        _active[-1].transfers["index by a mask"] += 1
    index = tuple(map(held, parts))
    with torch._C.DisableTorchFunctionSubclass():
        if value:
            held(tensor)[index] = held(value[0])
            return None
        found = held(tensor)[index]
        return on_device(found) if on else found


def _by_hand(func: Callable, args: tuple, kwargs: dict) -> Any:
    """What a CPU build's bindings refuse (operators such as ~), on the held data."""
    tensors = [leaf for leaf in _leaves(args, kwargs) if isinstance(leaf, Tensor) and leaf.ndim]
    if len({isinstance(tensor, OnDevice) for tensor in tensors}) > 1:
        raise MixedDevices(f"{func.__name__}: expected all tensors on one device, found cuda:0 and cpu.")
    with torch._C.DisableTorchFunctionSubclass():
        out = func(*_mapped(held, args), **_mapped(held, kwargs))
    return _carried(out, tensors, True)


def _carried(out: Any, given: list[Tensor], to_device: bool) -> Any:
    """What comes out of an operation: a tensor that was given is itself, another is new."""
    back = {id(held(tensor)): tensor for tensor in given}

    def carry(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return back.get(id(value), on_device(value) if to_device else value)

    return _mapped(carry, out)


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    name = func._schema.name.split("::")[1]
    leaves = _leaves(args, kwargs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    _check_generators(name, leaves, bool(there) or _is_cuda(kwargs.get("device")))
    if not there and not _is_cuda(kwargs.get("device")):
        return func(*args, **kwargs)
    if name == "_fused_sdp_choice":
        return 0
    to_device = _placed(func, name, args, kwargs, tensors)
    if name in _MATMUL and any(not tensor.is_floating_point() for tensor in there):
        raise MixedDevices(f'{name}: "addmm_cuda" not implemented for integers.')
    _count(_active[-1], name, bool(there), to_device)
    ours = _mapped(held, kwargs)
    if _is_cuda(ours.get("device")):
        ours["device"] = torch.device("cpu")
    out = _carried(func(*_mapped(held, args), **ours), tensors, to_device)
    if to_device and there:
        with suppress(AssertionError, AttributeError):
            return return_and_correct_aliasing(func, args, kwargs, out)
    return out


def _check_generators(name: str, leaves: list, on: bool) -> None:
    for leaf in leaves:
        if isinstance(leaf, torch.Generator) and on != (leaf.device.type == "cuda"):
            raise MixedDevices(f"{name}: expected a generator on the tensor's device, got one on {leaf.device}.")


def _placed(func: Any, name: str, args: tuple, kwargs: dict, tensors: list[Tensor]) -> bool:
    """Whether the result is on the device; refuses what CUDA would."""
    asked = kwargs.get("device")
    if name in _COPYING:
        return _is_cuda(asked) if asked is not None else isinstance(args[0], OnDevice)
    if name in _INDEXING:
        on = isinstance(args[0], OnDevice)
        if not on and any(isinstance(index, OnDevice) for index in args[1]):
            raise MixedDevices(f"{name}: indices should be either on cpu or on the same device as the indexed tensor (cpu).")
        if "put" in name and args[2].ndim and isinstance(args[2], OnDevice) != on:
            raise MixedDevices(f"{name}: the values are on another device than the tensor.")
        return on
    there = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    lenient = torch.Tag.pointwise in func.tags or name in _SCALARS_FROM_HOST
    strangers = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and not (lenient and tensor.ndim == 0)]
    if there and strangers:
        shapes = [[tuple(tensor.shape) for tensor in some] for some in (there, strangers)]
        raise MixedDevices(f"{name}: Expected all tensors to be on the same device, found {shapes[0]} on cuda:0 and {shapes[1]} on cpu.")
    return _is_cuda(asked) if asked is not None else bool(there)


def _count(mode: Pretence, name: str, there: bool, to_device: bool) -> None:
    mode.operations[name] += 1
    waits = name in ("_local_scalar_dense", *_SHAPE_FROM_DATA) or (name == "_to_copy" and not to_device)
    if there and waits:
        mode.transfers[name] += 1
