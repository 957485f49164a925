"""Methods of TransformerLens's bridge, and help for arguments of TransformerLens 2 and 3."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from .hook_names import canonical, hooked, is_vision
from .inputs import Inputs
from .layers import HookPoint, on_its_own_prompts
from .mixin import Mixin
from .quantised import Quantised
from .weights import OUR_ZEROS

_NOT_THERE = {
    "W_pos": "W_pos is a learned table of positions; Qwen2-VL has none: its positions are rotations of queries and keys (M-RoPE).",
    "W_E_pos": "W_E_pos is W_E and W_pos together, and Qwen2-VL has no W_pos (its positions are rotations): use W_E.",
    "pos_embed": "Qwen2-VL has no positional embedding: its positions are rotations of queries and keys (attn.hook_rot_q, hook_rot_k).",
}
_PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices")
_ELSEWHERE = {
    "hf_model": "HookedQwen2VL.from_hf(hf_model, processor) hooks a model in memory",
    "tokenizer": "set model.tokenizer = … after loading",
    "n_devices": "device_map='auto' spreads the model over devices",
    "move_to_device": "device= says where to",
    "torch_dtype": "dtype= says the dtype",
    "default_prepend_bos": "Qwen has no BOS to prepend",
    "default_padding_side": "set model.tokenizer.padding_side after loading",
    "first_n_layers": "model(inputs, stop_at_layer=n) runs the first n",
    "n_ctx": "the context is the checkpoint's",
    "checkpoint_index": "Qwen2-VL has no training checkpoints: revision= names a version on the hub",
    "checkpoint_value": "Qwen2-VL has no training checkpoints: revision= names a version on the hub",
    "trust_remote_code": "no remote code is run",
}


def refuse_old_arguments(arguments: dict[str, Any]) -> None:
    """Refuses arguments of TransformerLens's `from_pretrained`, with what to write instead. None and False are accepted.

    Raises:
        ValueError: an argument of TransformerLens's `from_pretrained`.
        TypeError: an unknown argument.
    """
    asked = {name: value for name, value in arguments.items() if value not in (None, False)}
    processing = [name for name in _PROCESSING if name in asked]
    if processing:
        call = ", ".join(f"{name}=True" for name in processing)
        raise ValueError(
            f"from_pretrained loads the weights as they are: drop {', '.join(processing)} and call model.process_weights({call}) "
            f"(its other steps are True unless you say False)."
        )
    for name in asked:
        if name in _ELSEWHERE:
            raise ValueError(f"from_pretrained takes no {name}=: {_ELSEWHERE[name]}.")
    if unknown := [name for name in arguments if name not in _PROCESSING and name not in _ELSEWHERE]:
        raise TypeError(f"from_pretrained got unexpected arguments: {', '.join(unknown)}.")


class Habits(Mixin):
    """Mixin of HookedQwen2VL, before HookedRootModule."""

    def __getattr__(self, name: str) -> Any:
        if name in _NOT_THERE:
            raise AttributeError(_NOT_THERE[name])
        return super().__getattr__(name)

    # ---- weights ------------------------------------------------------------------------------

    @classmethod
    def from_pretrained_no_processing(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
        """The same as `from_pretrained`, which never processes weights."""
        return cls.from_pretrained(name, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue] (HookedQwen2VL's)

    def enable_compatibility_mode(
        self,
        disable_warnings: bool = False,
        no_processing: bool = False,
        fold_ln: bool = True,
        center_writing_weights: bool | None = None,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """Calls `process_weights`, unless `no_processing`. Hook names are TransformerLens's in any case.

        Args:
            disable_warnings: suppress the warnings of process_weights about steps that it leaves out.
        """
        if no_processing:
            return
        with warnings.catch_warnings():
            if disable_warnings:
                warnings.simplefilter("ignore")
            self.process_weights(
                fold_ln=fold_ln,
                center_writing_weights=center_writing_weights,
                center_unembed=center_unembed,
                fold_value_biases=fold_value_biases,
                refactor_factored_attn_matrices=refactor_factored_attn_matrices,
            )

    def get_params(self) -> dict[str, Tensor]:
        """TransformerLens name -> weight of the text side; keys and values are repeated for each head."""
        from transformer_lens.model_bridge.get_params_util import get_bridge_params  # loads every model that bridges know

        return get_bridge_params(self)

    @property
    def n_params_total(self) -> int:
        """Number of all parameters, including tower and biases; tied weights count once; `b_O`, which checkpoints lack, does not count."""
        layers = [module.layer for module in self.modules() if isinstance(module, Quantised)]
        packed = {id(layer.weight): layer.in_features * layer.out_features for layer in layers}
        return sum(packed.get(id(weight), weight.numel()) for name, weight in self.named_parameters() if not OUR_ZEROS.match(name))

    def to(self, *args: Any, print_details: bool = True, **kwargs: Any) -> Any:
        """torch's `to`; `print_details` has no effect, nothing is printed."""
        return super().to(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue] (HookedRootModule's)

    # ---- running ------------------------------------------------------------------------------

    def input_to_embed(
        self,
        input: Inputs | str | list[str] | Int[Tensor, "batch pos"],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
    ) -> tuple[Float[Tensor, "batch pos d_model"], Any, None, Int[Tensor, "batch pos"]]:
        """(residual, tokens, None, attention mask); `residual` is the stream that enters block 0, with image embeddings.

        `model(residual, start_at_layer=0, inputs=tokens, attention_mask=mask)` continues the run. If `input` is `Inputs`, `tokens` is
        that `Inputs`; then leave out the mask.
        """
        inputs = self.as_inputs(input, attention_mask, prepend_bos, padding_side)
        tokens = inputs if isinstance(input, Inputs) else inputs.tokens
        return self.forward(inputs, stop_at_layer=0), tokens, None, inputs.attention_mask

    def run_with_hooks(
        self, input: Any, *args: Any, fwd_hooks: Any = (), bwd_hooks: Any = (), remove_batch_dim: bool = False, **kwargs: Any
    ) -> Any:
        """As in TransformerLens.

        Args:
            remove_batch_dim: for one prompt: hooks of the text side get and return activations without the batch axis.
        Raises:
            ValueError: an unknown hook name, or remove_batch_dim with several prompts.
        """
        if "names_filter" in kwargs:
            raise TypeError("run_with_hooks takes no names_filter=: run_with_cache does.")
        if remove_batch_dim:
            refuse_several(input)
            fwd_hooks, bwd_hooks = ([(name, _without_batch(hook)) for name, hook in hooks] for hooks in (fwd_hooks, bwd_hooks))
        return super().run_with_hooks(input, *args, fwd_hooks=list(fwd_hooks), bwd_hooks=list(bwd_hooks), **kwargs)  # pyright: ignore[reportAttributeAccessIssue] (HookedRootModule's)

    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook: Callable | None = None,
        *args: Any,
        hook_fn: Callable | None = None,
        **kwargs: Any,
    ) -> None:
        """As in TransformerLens; the second argument may be called hook or hook_fn."""
        if (hook is None) == (hook_fn is None):
            raise TypeError("add_hook takes the hook as hook= or hook_fn=, one of them.")
        for own in hooked(name, self.hook_dict):
            super().add_hook(own, hook_fn if hook is None else hook, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue] (HookedRootModule's)

    def get_hook_point(self, hook_name: str) -> HookPoint | None:
        """The hook point of this name, or None."""
        return self.hook_dict.get(canonical(hook_name))


def refuse_several(input: Any) -> None:
    """Raises ValueError for several prompts, whose batch axis cannot be removed."""
    batch = 1 if isinstance(input, str) or (isinstance(input, Tensor) and input.ndim == 1) else len(input)
    if batch != 1:
        raise ValueError(f"remove_batch_dim needs one prompt, got a batch of {batch}.")


def _without_batch(hook: Callable) -> Callable:
    checked = on_its_own_prompts(hook)

    @functools.wraps(checked)
    def single(activation: Tensor, hook: HookPoint) -> Any:
        if is_vision(str(hook.name)):
            return checked(activation, hook=hook)
        result = checked(activation[0], hook=hook)
        return result if result is None else result[None]

    return single
