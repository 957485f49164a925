"""Alternative names of hook points: TransformerLens's shorthand for the split inputs, and the names of its bridge.

`utilities.get_act_name("q_input", 2)` is `blocks.2.hook_q_input`; this model's name is `blocks.2.attn.hook_q_input`. The model's own
names are in `model.hook_dict`, in caches and in `hook.name`; alternative names are accepted wherever a name is given.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Collection, Sequence

_OF_A_BLOCK = {
    "hook_q_input": "attn.hook_q_input",
    "hook_k_input": "attn.hook_k_input",
    "hook_v_input": "attn.hook_v_input",
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "attn.hook_attn_in": "hook_attn_in",
    "attn.hook_out": "hook_attn_out",
    "mlp.hook_out": "hook_mlp_out",
}
_OF_THE_MODEL = {"embed.hook_out": "hook_embed", "hook_unembed": "unembed.hook_out"}
_IN_A_BLOCK = re.compile(r"((?:vision_encoder\.)?blocks\.\d+\.)(.+)")


def canonical(name: str) -> str:
    """The model's own name of a hook point; names that are not alternative names are returned unchanged."""
    found = _IN_A_BLOCK.fullmatch(name)
    if found is None:
        return _OF_THE_MODEL.get(name, name)
    return found[1] + _OF_A_BLOCK.get(found[2], found[2])


def others(name: str) -> list[str]:
    """The alternative names of a hook point."""
    found = _IN_A_BLOCK.fullmatch(name)
    if found is None:
        return [other for other, own in _OF_THE_MODEL.items() if own == name]
    return [found[1] + other for other, own in _OF_A_BLOCK.items() if own == found[2]]


def chosen(names_filter: str | Sequence[str] | Callable[[str], bool], known: Collection[str]) -> list[str]:
    """The hook points that a filter selects, in the model's order.

    A function is called with the model's own names; only if it selects none of them, with the alternative names.

    Raises:
        ValueError: an unknown name.
    """
    if not callable(names_filter):
        wanted = require([names_filter] if isinstance(names_filter, str) else names_filter, known)
        return [name for name in known if name in wanted]
    return [name for name in known if names_filter(name)] or [name for name in known if any(names_filter(other) for other in others(name))]


def hooked(names_filter: str | Sequence[str] | Callable[[str], bool], known: Collection[str]) -> list[str]:
    """The hook points to which a hook is added: `chosen`, but without the tower's if a function selects the decoder's and the tower's.

    TransformerLens users write `lambda name: name.endswith("pattern")` and mean the decoder; with the tower's patterns added, results
    by layer and head would be overwritten. A warning says how many hook points were left out, and how to include them.
    """
    names = chosen(names_filter, known)
    decoder = [name for name in names if not is_vision(name)]
    if not callable(names_filter) or not decoder or len(decoder) == len(names):
        return names
    warnings.warn(
        f"the filter also takes {len(names) - len(decoder)} hook points of the vision tower: the hook goes on the decoder's alone. "
        f"For the tower, name them or filter by name.startswith('vision_').",
        stacklevel=4,
    )
    return decoder


def is_vision(name: str) -> bool:
    """Whether a hook point is in the vision tower or the projector, whose activations are packed over images."""
    return name.startswith(("vision_encoder.", "vision_projector."))


def require(names: Sequence[str], known: Collection[str]) -> set[str]:
    """The model's own names of these hook points; ValueError if a name is unknown."""
    own = {name: canonical(name) for name in names}
    unknown = [name for name in names if own[name] not in known]
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), known, n=1)
        raise ValueError(
            f"no hook point is called {', '.join(map(repr, unknown))}{f': did you mean {close[0]!r}?' if close else '.'} "
            f"model.hook_dict lists them all (transformer_lens.utilities.get_act_name('resid_pre', 3) spells one out)."
        )
    return set(own.values())
