"""The type of a model for analyses: any TransformerLens model, such as `HookedQwen2VL` or a bridge.

For the type checker only; nothing is checked at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from typing import Protocol

    from torch import Tensor

    class Model(Protocol):
        """A TransformerLens model. `run_with_cache` returns (the model's output, an ActivationCache)."""

        @property
        def cfg(self) -> Any: ...
        @property
        def W_U(self) -> Tensor: ...
        def __call__(self, input: Any, *args: Any, **kwargs: Any) -> Any: ...
        def run_with_cache(self, input: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]: ...
        def run_with_hooks(self, input: Any, *args: Any, fwd_hooks: Sequence[tuple[Any, Callable]] = ..., **kwargs: Any) -> Any: ...
        def hooks(self, fwd_hooks: Sequence[tuple[Any, Callable]] = ..., *args: Any, **kwargs: Any) -> AbstractContextManager: ...
        def __getattr__(self, name: str) -> Any: ...

else:
    Model = Any
