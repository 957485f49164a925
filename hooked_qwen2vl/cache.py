"""The activation cache: TransformerLens's `ActivationCache`, with the vision tower's activations stored separately.

`ActivationCache` assumes that every activation has a batch axis and a position axis. The tower's activations are packed
over images ([1 patch …]) and have neither, so they are in `cache.vision`, and slicing by batch or position leaves them
as they are.

On disk a cache is one safetensors file. Activations are stored under the names of their hooks; two names of one tensor
(`hook_resid_post` and the next `hook_resid_pre`) are stored once. The header has the order of the names, the settings, and
the shape of the model, so that another model's cache is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformer_lens import ActivationCache
from transformer_lens.utilities import Slice, SliceInput

from .devices import WeightsAt
from .files import open_regular, whole_file
from .geometry import PromptShape
from .hook_names import canonical, is_vision
from .layers import PROMPT, readable

FORMAT = "hooked_qwen2vl cache 1"
_PROMPT = "prompt."  # prefix of the tensors that describe the prompts' shape


def heads_first(name: str) -> bool:
    """Whether an activation is [batch head pos …]: scores, patterns and (Qwen3-VL) normed queries and keys."""
    return name.endswith(("hook_attn_scores", "hook_pattern", "hook_q_normed", "hook_k_normed")) or bool(_HEAD_NORM.search(name))


def position_axes(name: str) -> tuple[int, int | None]:
    """(the axis of an activation's positions, the axis of its keys' positions or None)."""
    return -2 if heads_first(name) else 1, -1 if name.endswith(("hook_attn_scores", "hook_pattern")) else None


_HEAD_NORM = re.compile(r"\.[qk]_norm\.hook_\w+$")


def _where_the_cache_is(method: Callable) -> Callable:
    """The method, run on the cache's device: the weights that it reads and its tensor arguments are copied there."""

    @wraps(method)
    def run(self: HookedCache, *args: Any, **kwargs: Any) -> Any:
        held = next(iter(self.cache_dict.values()), None)
        own: Any = self.model
        if held is None or isinstance(own, WeightsAt):
            return method(self, *args, **kwargs)
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(held.device), (args, kwargs))
        if all(weight.device == held.device for weight in own.parameters()):
            return method(self, *args, **kwargs)
        model, self.model = own, cast(Any, WeightsAt(own, held.device))
        try:
            return method(self, *args, **kwargs)
        finally:
            self.model = model

    return run


class HookedCache(ActivationCache):
    """An `ActivationCache` of one run of a HookedQwen2VL.

    The cache may be on another device than the model: its methods then compute there, with copies of the weights they need.

    Attributes:
        cache_dict: text side, hook name -> [batch pos …].
        vision: tower and projector, hook name -> [1 patch …] or [1 image_token …].
        prompt_shape: layout of the prompts that were run (`geometry.PromptShape`). TransformerLens's patching functions refuse
            to patch these activations into prompts of another layout; hooks of your own that copy tensors are not checked.
    """

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: Any,
        has_batch_dim: bool = True,
        vision: dict[str, Tensor] | None = None,
        prompt_shape: PromptShape | None = None,
    ):
        text = {name: value for name, value in cache_dict.items() if not is_vision(name)}
        super().__init__(text, model, has_batch_dim=has_batch_dim)
        self.vision = dict(vision or {}) | {name: value for name, value in cache_dict.items() if is_vision(name)}
        self.prompt_shape = prompt_shape

    def __getitem__(self, key: Any) -> Tensor:
        value = self._held(key)
        if self.prompt_shape is not None:
            setattr(value, PROMPT, self.prompt_shape)
        return value

    def _held(self, key: Any) -> Tensor:
        if isinstance(key, str) and is_vision(key):
            name = canonical(key)
        else:
            try:
                return super().__getitem__(key)
            except KeyError as error:
                name = canonical(str(error.args[0]))
        held = self.vision if is_vision(name) else self.cache_dict
        if name not in held:
            raise KeyError(self._absent(name))
        return held[name]

    def _absent(self, name: str) -> str:
        known = getattr(self.model, "hook_dict", {})
        if name not in known:
            return f"no hook point is called {name!r}; cache.keys() and cache.vision list what was kept, model.hook_dict all there are."
        if is_vision(name):
            return f"{name!r} was not kept: run_with_cache(inputs, vision=True), or its name in names_filter=, keeps the tower's."
        return f"{name!r} was not kept: name it in run_with_cache(inputs, names_filter=…)."

    def without_prompt(self) -> HookedCache:
        """The same activations without `prompt_shape`: they can be patched into prompts of any layout, as in Patchscopes."""
        free = {name: value.view_as(value) for name, value in {**self.cache_dict, **self.vision}.items()}
        return HookedCache(free, self.model, self.has_batch_dim)

    def __contains__(self, key: object) -> bool:
        return any(
            name in held for name in (key, canonical(key) if isinstance(key, str) else key) for held in (self.cache_dict, self.vision)
        )

    def __repr__(self) -> str:
        return f"HookedCache with keys {list(self.cache_dict)} and vision keys {list(self.vision)}"

    def to(self, device: str | torch.device) -> HookedCache:
        """Moves text and vision activations."""
        super().to(device)
        self.vision = {name: value.to(device) for name, value in self.vision.items()}
        return self

    def save(self, path: str | Path) -> Path:
        """Writes text and vision activations to one safetensors file, in their own dtypes.

        An existing file is replaced only when the new one is complete. Activations that are not contiguous are copied
        for writing, which takes at most the memory of the cache once more.

        Returns:
            the path.
        Raises:
            ValueError: the cache is empty.
        """
        path, activations = Path(path), {**self.cache_dict, **self.vision}
        if not activations:
            raise ValueError("the cache holds no activation: there is nothing to save.")
        first: dict[tuple, str] = {}
        stored = {name: first.setdefault(_place(value), name) for name, value in activations.items()}
        tensors = {name: activations[name].detach().contiguous() for name in first.values()}
        # Views of a larger tensor are copied: safetensors refuses them otherwise.
        tensors = {name: value if _whole(value) else value.clone() for name, value in tensors.items()}
        if self.prompt_shape is not None:
            tensors |= {f"{_PROMPT}{name}": getattr(self.prompt_shape, name).contiguous() for name in ("position_ids", "attention_mask")}
        header = {
            "format": FORMAT,
            "sliced": json.dumps(self.prompt_shape is not None and self.prompt_shape.sliced),
            "model_name": str(getattr(self.model.cfg, "model_name", "")),
            "model_shape": json.dumps(_model_shape(self.model)),
            "has_batch_dim": json.dumps(self.has_batch_dim),
            "stored": json.dumps(stored),
        }
        with whole_file(path) as file:  # never into the old file, which may be mapped into this very cache
            save_file(tensors, file, header)
        return path

    @classmethod
    def load(cls, path: str | Path, model: Any, device: str | torch.device = "cpu") -> HookedCache:
        """Reads a cache that `save` wrote, for the same model or another of the same shape.

        On the CPU the activations are memory-mapped and read when first used; writing into them does not
        change the file.

        Raises:
            ValueError: no such file, not the file of a cache, or a cache of a model of another shape.
        """
        try:
            open_regular(path).close()
            with safe_open(path, framework="pt", device=str(device)) as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise ValueError(f"{path} is not a cache of this package's: expected a file that cache.save wrote.")
                said = _header(path, header)
                _require_shape(path, header["model_name"], said["model_shape"], model)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, safe_open is no mapping
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read as a cache ({error}): expected a file that cache.save wrote.") from error
        try:
            return cls._decode(said, tensors, model)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, error) from error

    @classmethod
    def _decode(cls, said: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Any) -> HookedCache:
        prompt = {name.removeprefix(_PROMPT): value for name, value in tensors.items() if name.startswith(_PROMPT)}
        shape = PromptShape(**prompt, sliced=said["sliced"]) if prompt else None
        activations = {name: tensors[of] for name, of in said["stored"].items()}
        return cls(activations, model, said["has_batch_dim"], prompt_shape=shape)

    def apply_slice_to_batch_dim(self, batch_slice: Slice | SliceInput) -> HookedCache:
        """A cache of some rows; `cache.vision` keeps the activations of all images."""
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        prompt = None if self.prompt_shape is None else self.prompt_shape.rows(batch_slice)
        return HookedCache(sliced.cache_dict, self.model, sliced.has_batch_dim, self.vision, prompt)

    # methods of TransformerLens that read weights
    _ensure_head_results = _where_the_cache_is(ActivationCache._ensure_head_results)
    get_neuron_results = _where_the_cache_is(ActivationCache.get_neuron_results)
    stack_neuron_results = _where_the_cache_is(ActivationCache.stack_neuron_results)
    logit_attrs = _where_the_cache_is(ActivationCache.logit_attrs)

    def logit_lens(self, **settings: Any) -> Any:
        """As in TransformerLens; the residual stream is copied to the model's device, where the unembedding is."""
        stream = {name: value for name, value in self.cache_dict.items() if "hook_resid" in name}
        here = {name: value.to(self.model.cfg.device) for name, value in stream.items()}
        return ActivationCache.logit_lens(HookedCache(here, self.model, self.has_batch_dim), **settings)

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: Slice | SliceInput = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Tensor | tuple[Tensor, list[str]]:
        """As in TransformerLens; with mode="all", what DeepStack adds is a component `{l}_deepstack`, after block l's MLP."""
        found: Any = super().decompose_resid(layer, mlp_input, mode, False, pos_slice, incl_embeds, True)
        stack, labels = found
        added = self._deepstack(layer, pos_slice) if mode == "all" else {}
        for name, term in added.items():
            after = labels.index(name.replace("deepstack", "mlp_out")) + 1
            labels.insert(after, name)
            stack = torch.cat((stack[:after], term[None], stack[after:]))
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, self._up_to(layer), mlp_input=mlp_input, pos_slice=pos_slice)
        return (stack, labels) if return_labels else stack

    @_where_the_cache_is
    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Slice | SliceInput = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, list[str]]:
        """As in TransformerLens; what DeepStack adds comes last, as components `{l}_deepstack`."""
        found: Any = super().get_full_resid_decomposition(layer, mlp_input, expand_neurons, apply_ln, pos_slice, True, project_output_onto)
        stack, labels = found
        added = self._deepstack(layer, pos_slice)
        if added:
            terms = torch.stack(list(added.values()))
            if apply_ln:
                terms = self.apply_ln_to_stack(terms, self._up_to(layer), mlp_input=mlp_input, pos_slice=pos_slice)
            terms = terms if project_output_onto is None else terms @ project_output_onto.to(terms)
            stack, labels = torch.cat((stack, terms)), [*labels, *added]
        return (stack, labels) if return_labels else stack

    def _up_to(self, layer: int | None) -> int:
        return self.model.cfg.n_layers if layer in (None, -1) else layer

    def _deepstack(self, layer: int | None, pos_slice: Slice | SliceInput) -> dict[str, Float[Tensor, "*batch_and_pos d_model"]]:
        """Label -> what DeepStack adds to the residual stream, for each addition before block `layer`."""
        merged = range(min(self._up_to(layer), len(cast(Any, self.model.cfg).vision.deepstack_layers)))
        positions = Slice.unwrap(pos_slice)
        return {f"{l}_deepstack": positions.apply(self[f"blocks.{l}.hook_deepstack"], dim=-2) for l in merged}

    @_where_the_cache_is
    def apply_ln_to_stack(
        self,
        residual_stack: Float[Tensor, "component *batch_and_pos d_model"],
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Slice | SliceInput = None,
        batch_slice: Slice | SliceInput = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Float[Tensor, "component *batch_and_pos d_model"]:
        """As in TransformerLens, and multiplied by the norm's weight if that has not been folded.

        With cached scales TransformerLens divides by the scale and leaves the weight out, which is
        right only on folded weights. Here the components sum to the normalised stream with folded and unfolded weights.
        """
        scaled = super().apply_ln_to_stack(residual_stack, layer, mlp_input, pos_slice, batch_slice, has_batch_dim, recompute_ln)
        if recompute_ln and layer in (None, -1, self.model.cfg.n_layers):  # that path ran the norm itself
            return scaled
        return scaled * self._norm_weight(layer, mlp_input).to(scaled.device)

    def _stack_neuron_results_apply_ln_projected(
        self, layer: int, pos_slice: Slice, neuron_slice: Slice, project_2d: Tensor, mlp_input: bool = False
    ) -> Tensor:
        """As in TransformerLens, and with the norm's weight, which its fused path (scale, then direction) leaves out too."""
        weighted = project_2d * self._norm_weight(layer, mlp_input).to(project_2d)[:, None]
        return super()._stack_neuron_results_apply_ln_projected(layer, pos_slice, neuron_slice, weighted, mlp_input)

    def _norm_weight(self, layer: int | None, mlp_input: bool) -> Float[Tensor, "d_model"]:
        """The weight of the norm applied to the residual stream at this layer: ln1, ln2 (mlp_input), or ln_final at the end."""
        if layer in (None, -1, self.model.cfg.n_layers):
            return readable(self.model.ln_final.w, "the norm's weight")
        block = self.model.blocks[layer]
        return readable(block.ln2.w if mlp_input else block.ln1.w, "the norm's weight")


def _place(value: Tensor) -> tuple:
    """A key that is equal for two names of one tensor and for nothing else; an empty tensor equals only itself."""
    return (value.data_ptr() or id(value), value.dtype, value.shape, value.stride())


def _whole(value: Tensor) -> bool:
    """Whether the tensor covers its whole storage."""
    return value.untyped_storage().nbytes() == value.nbytes


def _model_shape(model: Any) -> dict[str, int]:
    """The sizes that activations' shapes depend on, and d_vocab."""
    text, vision = model.cfg.text, model.cfg.vision
    names = ("n_layers", "n_heads", "d_head", "d_mlp")
    return {
        **{name: getattr(text, name) for name in ("d_model", "d_vocab", "n_key_value_heads", *names)},
        **{f"vision_{name}": getattr(vision, name) for name in ("d_vision", "spatial_merge_size", *names)},
    }


def _header(path: str | Path, header: Mapping[str, str]) -> dict[str, Any]:
    """The fields of the header that `save` wrote, parsed and checked for their types."""
    kinds = {"model_shape": dict, "stored": dict, "has_batch_dim": bool, "sliced": bool}
    try:
        said = {name: json.loads(header[name]) for name in kinds}
        strange = [name for name, kind in kinds.items() if not isinstance(said[name], kind)]
        if strange or "model_name" not in header:
            raise ValueError(f"no such {' or '.join(strange) or 'model_name'}")
    except (ValueError, KeyError, RecursionError) as error:
        raise _damaged(path, error) from error
    return said


def _damaged(path: str | Path, error: Exception) -> ValueError:
    why = " ".join(str(error).split())[:200]
    return ValueError(f"{path} cannot be read as a cache ({type(error).__name__}: {why}): its header is damaged.")


def _require_shape(path: str | Path, name: str, theirs: Mapping[str, Any], model: Any) -> None:
    ours = _model_shape(model)
    differing = [f"{what} {theirs.get(what)} (the model: {ours[what]})" for what in ours if theirs.get(what) != ours[what]]
    if differing:
        raise ValueError(
            f"{path} is a cache of {name!r}, whose shape is another: {', '.join(differing)}; load it with the model that made it."
        )


def cache_image(cache: HookedCache, name: str, inputs: Any, row: int = 0, image: int = 0) -> Float[Tensor, "rows cols ..."]:
    """One image's activations of the tower or projector, as a grid in raster order.

    Args:
        name: a hook of the tower ([1 patch …] gives the grid of patches: 14 pixels, 16 in Qwen3-VL) or of the projector's
            image tokens ([1 image_token …] gives the grid of image tokens: 28 pixels, 32 in Qwen3-VL).
        row: the prompt. image: which of its images.
    Raises:
        ValueError: an activation whose first axis is not patches (scores and patterns: index `cache.vision`).
        KeyError: the activation was not cached (`run_with_cache(..., vision=True)` caches the tower).
    """
    if name not in cache.vision:
        raise KeyError(
            f"{name!r} is not in the cache: run_with_cache(inputs, vision=True) caches the tower; it holds "
            f"{sorted(cache.vision) or 'nothing of it'}."
        )
    if name.endswith(("hook_attn_scores", "hook_pattern")):
        raise ValueError(f"{name!r} is patch by patch, not a picture: index cache.vision[{name!r}] itself.")
    return inputs.unpack_image(cache.vision[name][0], row=row, image=image)
