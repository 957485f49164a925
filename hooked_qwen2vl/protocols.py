"""What an analysis asks of a model: any TransformerLens model has it, `HookedQwen2VL` or a bridge.

For the type checker; nothing is checked while running, where a model that lacks something says so itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from typing import Protocol

    from torch import Tensor

    class Model(Protocol):
        """A TransformerLens model. `run_with_cache` gives (what the model returns, an ActivationCache)."""

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
