"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL as a hooked model: a vision tower and projector before a TransformerLens decoder.

    pixels ─► vision_encoder ─► vision_projector ─► (image embeddings) ┐      (and in Qwen3-VL DeepStack ┐)
    tokens ─► embed ────────────────────────────────────────────────► merge ─► blocks, the first of them + ─► ln_final ─► unembed

The configuration chooses the modules: which tower (`TOWERS`), how many DeepStack mergers, which norms and biases. The model
keeps no state between forwards. Source of the architecture: technical reports of Qwen2-VL (Wang et al., 2024), Qwen2.5-VL (Bai et al.,
2025) and Qwen3-VL (2025), and `modeling_qwen2_vl.py`, `modeling_qwen2_5_vl.py` and `modeling_qwen3_vl.py` of transformers.
"""

from __future__ import annotations

import inspect
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.utilities import Slice, SliceInput

from . import vision, vision_qwen3, vision_qwen25
from .adapters import adapted_model, is_adapted, merge_adapter, merged_weights
from .attention import Causal
from .block import decoder_block
from .cache import HookedCache, position_axes
from .cache_size import CacheSize, cache_size, require_room
from .checkpoint import open_checkpoint
from .config import HookedQwen2VLConfig, convert_config
from .devices import check_storage_can_be_shared, dispatch, n_devices, to_its_device
from .export import export_text_model
from .generate import Generation, said_so_far
from .habits import Habits, refuse_old_arguments, refuse_several
from .hook_names import chosen, hooked, is_vision, require
from .image_embeddings import ImageEmbeddings, deepstack_terms, merge
from .inputs import Inputs
from .layers import HookPoint, RMSNorm, listened, refuse_hooks, running_prompt
from .overflow import finite_check
from .processor import Processor
from .processor_files import has_processor
from .quantised import by_bitsandbytes, load_reference, quantised_layers, refuse_editing
from .rope import text_rotation
from .running import RunningPositions, running_at, running_positions
from .tl_weights import Embed, TransformerLensWeights, Unembed
from .tokens import Tokens, _check_side
from .weight_processing import process_weights
from .weights import load_weights, refuse_quantised

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
ReturnType = Literal["logits", "loss", "both", "logits_and_cache"] | None
_SPLIT_INPUTS = ("attn.hook_q_input", "attn.hook_k_input", "attn.hook_v_input")
PREFIX_HOOK = "vision_projector.hook_out"
LOGITS_HOOK = "unembed.hook_out"
TOWERS = {"qwen2_vl": vision, "qwen2_5_vl": vision_qwen25, "qwen3_vl": vision_qwen3}


class HookedQwen2VL(ImageEmbeddings, Generation, Tokens, TransformerLensWeights, Habits, HookedRootModule):
    """Qwen2-VL, Qwen2.5-VL or Qwen3-VL with TransformerLens's hooks, names and shapes.

    Attributes:
        cfg: a TransformerLensConfig with the settings of the decoder and, in `cfg.vision`, of the tower.
        processor: tokenizer, chat template and image settings; None for bare weights.
    """

    def __init__(self, cfg: HookedQwen2VLConfig, processor: Processor | None = None):
        super().__init__()
        self.cfg, self.processor = cfg, processor
        self._follow_tokenizer()
        tower = TOWERS[cfg.vision.tower]
        self.vision_encoder = tower.VisionEncoder(cfg.vision)
        self.vision_projector = tower.VisionProjector(cfg.vision)
        self.embed = Embed(cfg.d_vocab, cfg.d_model)
        self.hook_embed = HookPoint()  # [batch, pos, d_model], images merged in
        self.blocks = nn.ModuleList(decoder_block(cfg.text) for _ in range(cfg.n_layers))  # pyright: ignore[reportAttributeAccessIssue] (a property, to be found statically)
        for layer, _ in enumerate(cfg.vision.deepstack_layers):
            self.blocks[layer].hook_deepstack = HookPoint()  # [batch, pos, d_model], added after the block
        self.ln_final = RMSNorm(cfg.d_model, cfg.eps)  # pyright: ignore[reportAttributeAccessIssue] (a property, to be found statically)
        self.unembed = Unembed(cfg.d_model, cfg.d_vocab)
        if cfg.text.tie_word_embeddings:
            self.unembed.weight = self.embed.weight
        self._identity = uuid.uuid4().hex
        self._hooking_threads: list[int] = []
        self.setup()
        self.eval()

    # ---- loading ------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: str | dict | None = None,
        max_memory: dict | None = None,
        offload_folder: str | Path | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        adapter: str | Path | bool | None = None,
        **of_transformer_lens: Any,
    ) -> HookedQwen2VL:
        """Loads "scenes" (the embedded model), or a Qwen2-VL, Qwen2.5-VL or Qwen3-VL from a folder or hub id, from safetensors.

        If the folder has a LoRA adapter, with or without the base weights, the adapter is merged: `model.cfg.adapter` names it.

        Args:
            dtype: of the weights; None keeps the checkpoint's own and copies nothing.
            device: where the model goes. device_map: how accelerate spreads it over GPUs, CPU and disk: "auto",
                "balanced", "sequential", or a map from modules (blocks are not split) to devices.
            max_memory: device -> bytes or "10GiB", for a device_map given as a name.
            offload_folder: an empty or new folder for the weights that the device_map puts on "disk".
            revision, local_files_only: for hub ids, as in transformers.
            adapter: a PEFT folder or hub id, merged into the weights by peft (`pip install hooked-qwen2vl[adapters]`), in the
                dtype asked for; False ignores an adapter in the folder.
            of_transformer_lens: arguments of TransformerLens 2 and 3, such as `fold_ln=…`: an error that says what to call here.
        Raises:
            ValueError: another architecture, an unsupported configuration, missing, unused, misshapen or quantised
                weights, damaged files, no network, an unknown dtype, or a device_map that cannot be satisfied.
        """
        refuse_old_arguments(of_transformer_lens)
        wanted = _as_dtype(dtype)
        if device is not None and device_map is not None:
            raise ValueError("pass device= or device_map=, not both.")
        if device_map is None and (max_memory is not None or offload_folder is not None):
            raise ValueError("max_memory= and offload_folder= belong to a device_map=, such as 'auto'.")
        checkpoint = open_checkpoint(name, revision, local_files_only, adapter)
        if by_bitsandbytes(checkpoint.config):
            if device_map is not None or checkpoint.adapter is not None:
                asked = "device_map=" if device_map is not None else f"the adapter {checkpoint.adapter}"
                raise ValueError(f"{checkpoint.name} is quantised by bitsandbytes: it stays on one device= and as it is, without {asked}.")
            processor = Processor.from_folder(checkpoint.folder) if has_processor(checkpoint.folder) else None
            return cls.from_hf(load_reference(checkpoint.folder, checkpoint.name, device, wanted), processor)
        refuse_quantised(checkpoint.config, checkpoint.name)
        cfg = convert_config(checkpoint.config, checkpoint.name, checkpoint.generation)
        processor = Processor.from_folder(checkpoint.folder) if has_processor(checkpoint.folder) else None
        source: Any = checkpoint
        if checkpoint.adapter is not None:
            source = merge_adapter(cfg, checkpoint.config, checkpoint, checkpoint.adapter, wanted)
            _say_adapted(cfg, str(checkpoint.adapter if adapter is None else adapter), source)
        model = cls._from_weights(cfg, source, processor, str(checkpoint.folder), wanted)
        if wanted is not None:
            model.to(wanted)
        if device_map is not None:
            return dispatch(model, device_map, max_memory, offload_folder)
        return model.to(device) if device is not None else model

    @classmethod
    def from_hf(cls, hf_model: Any, processor: Any = None) -> HookedQwen2VL:
        """The hooked model of a Qwen2VL-, Qwen2_5_VL- or Qwen3VLForConditionalGeneration in memory; it shares the weights.

        If the model has LoRA adapters (a PeftModel, or transformers' own `add_adapter`), the active ones are merged into copies
        of the weights; `model.cfg.adapter` has their names.

        Args:
            processor: transformers' Qwen2VLProcessor or a `Processor`; without one, pass `Inputs` or tokens.
        Raises:
            ValueError: another architecture, an unsupported configuration, or weights that are not plain
                floating-point tensors in memory (quantised, or spread over devices by accelerate).
        """
        adapted, adapter = is_adapted(hf_model), None
        if adapted:
            hf_model, adapter = adapted_model(hf_model)
        name = getattr(hf_model.config, "name_or_path", "") or type(hf_model).__name__
        config, layers = hf_model.config.to_dict(), quantised_layers(hf_model)
        if layers and by_bitsandbytes(config):
            del config["quantization_config"]
        refuse_quantised(config, name)
        check_storage_can_be_shared(hf_model, name)
        if processor is not None and not isinstance(processor, Processor):
            processor = Processor.from_hf(processor)
        generation = hf_model.generation_config.to_dict() if hf_model.generation_config is not None else {}
        cfg = convert_config(config, name, {k: v for k, v in generation.items() if v is not None})
        source = merged_weights(hf_model) if adapted else hf_model.state_dict()
        if adapter is not None:
            _say_adapted(cfg, adapter, source)
        return cls._from_weights(cfg, source, processor, name, layers=layers)

    @classmethod
    def _from_weights(
        cls,
        cfg: HookedQwen2VLConfig,
        source: Any,
        processor: Processor | None,
        where: str,
        dtype: torch.dtype | None = None,
        layers: dict[str, torch.nn.Module] | None = None,
    ) -> HookedQwen2VL:
        with torch.device("meta"):
            model = cls(cfg, processor)
        load_weights(model, source, where, dtype, layers)
        model._follow_weights()
        return model

    def _apply(self, fn: Callable, recurse: bool = True) -> HookedQwen2VL:
        """Called by torch for every change of device or dtype; keeps `cfg.device` and `cfg.dtype` up to date."""
        self._require_present("moving or casting the model")
        super()._apply(fn, recurse)
        self._follow_weights()
        return self

    def _follow_weights(self) -> None:
        self.cfg.dtype = self.embed.weight.dtype
        if not self.embed.weight.is_meta:
            self.cfg.device = str(self.embed.weight.device)

    def _require_present(self, what: str) -> None:
        """Raises RuntimeError if accelerate has offloaded weights, ValueError if weights are quantised: the change would miss them."""
        refuse_editing(self, what)
        away = [name for name, weight in self.named_parameters() if weight.is_meta]
        if away:
            raise RuntimeError(
                f"{what} needs every weight in memory, but {len(away)} are offloaded, such as {away[0]}: load the model "
                f"without device_map, or with more memory (and with the dtype that you want)."
            )

    # ---- inputs -------------------------------------------------------------------------------

    def to_inputs(
        self,
        prompt: str | Sequence[str] | None = None,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        answers: str | Sequence[str | None] | None = None,
        messages: Sequence[Any] | None = None,
        template: bool | str = True,
        system: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        fps: float | Sequence[float] | None = None,
        special_tokens: bool = False,
    ) -> Inputs:
        """`Inputs` from a prompt, several prompts, or chat messages, with their images and videos.

        Args:
            prompt: a question, or several (then padded on the left).
            images: the prompt's images, or one list of images for each prompt; PIL images, paths or arrays.
            videos: the same; a video is a list of frames or an array [t, h, w, 3]. All frames are used, none is resampled.
            answers: answers to append to the prompts (teacher-forced), without an end token.
            messages: a chat in HF's format (or several), which contains its own images.
            template: True for the chat template, or its name if there are several; with False the images come first, then the text.
            system: system prompt; None takes the template's default.
            min_pixels, max_pixels: smallest and largest area in pixels to which an image is resized, as in Qwen2-VL; for a video
                in Qwen3-VL, the area of all its frames together.
            fps: frames per second of the given frames, one number for all videos or one for each. Qwen2.5-VL and Qwen3-VL
                require it, because they encode the time of each frame; Qwen2-VL does not, and refuses it.
            special_tokens: whether special tokens in the text count as such. By default they do not: `<|im_end|>` in a question is
                tokenized as plain text and ends no turn. With True, placeholders (`<|image_pad|>`) in a prompt say where its images go.
        Raises:
            ValueError: an empty prompt, images and placeholders that do not match, an unreadable or
                extreme image, a prompt past the context, or a model without a processor.
        """
        if self.processor is None:
            raise ValueError(
                "this model has no processor: load it from a folder that has one, pass processor= to from_hf, or build "
                "Inputs.from_processor(batch, model.cfg)."
            )
        inputs = self.processor.to_inputs(
            self.cfg, prompt, images, videos, answers, messages, template, system, min_pixels, max_pixels, fps, special_tokens
        )
        return inputs.to(self.cfg.device)

    def as_inputs(
        self,
        input: Any,
        attention_mask: Tensor | None = None,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> Inputs:
        """Anything that the model can be called with (Inputs, a string, strings, token ids), as Inputs.

        Args:
            attention_mask: for token ids only; None infers the padding from the ids (see `inputs.padding_mask`).
            prepend_bos: True warns once and prepends nothing: Qwen has no BOS.
            padding_side: the side on which strings and Inputs are padded (None: the tokenizer's side for strings; Inputs stay as
                they are). For token ids, the side on which the padding id is padding.
        Raises:
            ValueError: another type of input, token ids with image placeholders, or padding that could be text.
        """
        self._explain_bos(prepend_bos)
        _check_side(padding_side)
        if isinstance(input, Tensor):
            return Inputs.from_tokens(input, self.cfg, attention_mask, padding_side).to(self.cfg.device)
        if attention_mask is not None:
            raise ValueError("text and Inputs carry their own attention mask: pass one with bare tokens only.")
        if isinstance(input, (str, list, tuple)):
            input = self._texts(input)
            padding_side = padding_side or self._tokenizer().padding_side
        if not isinstance(input, Inputs):
            raise ValueError(f"expected Inputs, a string, a list of strings, or token ids, got {type(input).__name__}.")
        if padding_side is not None:
            input = input.right_padded() if padding_side == "right" else input.left_padded()
        return input.to(self.cfg.device)

    def _texts(self, input: str | Sequence[str]) -> Inputs:
        strings = [input] if isinstance(input, str) else list(input)
        if not all(isinstance(string, str) for string in strings):
            raise ValueError("expected Inputs, a string, a list of strings, or a tensor of token ids.")
        if self.processor is None:
            encoded = self._encode(strings, "left", truncate=False)
            return Inputs.from_tokens(encoded["input_ids"], self.cfg, encoded["attention_mask"])
        return self.processor.to_inputs(self.cfg, strings, template=False, special_tokens=True)

    # ---- running ------------------------------------------------------------------------------

    def forward(
        self,
        input: Inputs | str | list[str] | Int[Tensor, "batch pos"] | Float[Tensor, "batch pos d_model"],
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        inputs: Inputs | None = None,
        logits_at: int | slice | None = None,
        past_kv_cache: TransformerLensKeyValueCache | None = None,
        past_key_values: TransformerLensKeyValueCache | None = None,
    ) -> Any:
        """Runs the model and returns logits, the loss, or a residual stream.

        Args:
            input: prompts; or, with `start_at_layer`, the residual stream before that block. Then `inputs` are the prompts
                that it belongs to, for positions, padding and targets.
            return_type: "logits" [batch pos d_vocab], "loss" (mean next-token cross-entropy in nats), "both" (logits, loss),
                "logits_and_cache" (logits, past_kv_cache), or None to run only for the hooks.
            loss_per_token: return the loss of each token [batch pos-1] instead of the mean; 0 where there is no target.
            prepend_bos, padding_side, attention_mask: see `as_inputs`.
            stop_at_layer: return the residual stream before this block instead of logits.
            logits_at: compute logits at these positions only (an int keeps the axis); the blocks still run on all positions.
            past_kv_cache: keys and values of the tokens before the input (`TransformerLensKeyValueCache.init_cache(model.cfg,
                device, batch)`, empty at first); the input's are appended unless it is frozen. `past_key_values` is an alias.
        Raises:
            ValueError: placeholders without images, a layer out of range, an unknown return type, or arguments that exclude
                each other.
        """
        if return_type not in ("logits", "loss", "both", "logits_and_cache", None):
            raise ValueError(f"return_type must be 'logits', 'loss', 'both', 'logits_and_cache' or None, got {return_type!r}.")
        if torch.compiler.is_compiling():
            refuse_hooks(self)
        past = past_kv_cache if past_kv_cache is not None else past_key_values
        if past is not None or return_type == "logits_and_cache":
            if return_type in ("loss", "both") or (start_at_layer, stop_at_layer, inputs) != (None, None, None):
                raise ValueError(
                    "with a past_kv_cache all layers are run, for logits: drop the loss, start_at_layer, stop_at_layer and inputs."
                )
            return self._go_on(self.as_inputs(input, attention_mask, prepend_bos, padding_side), past, return_type, logits_at)
        if start_at_layer is None and inputs is not None:
            raise ValueError("inputs= says what a residual stream belongs to: it goes with start_at_layer=.")
        layers = self._layers(start_at_layer, stop_at_layer)
        if start_at_layer is None:
            inputs = self.as_inputs(input, attention_mask, prepend_bos, padding_side)
        else:
            inputs, residual = self._resume(input, inputs, attention_mask, padding_side)
        with self.watched_run(inputs):
            if start_at_layer is None:
                residual, images = self.embed_prompts(inputs)
            else:
                images = None
            residual = self.run_blocks(residual, inputs, layers, images=images)
            if stop_at_layer is not None:
                return residual
            return self.read_out(residual, inputs, return_type, loss_per_token, logits_at)

    def _go_on(self, new: Inputs, past: TransformerLensKeyValueCache | None, return_type: ReturnType, logits_at: int | slice | None) -> Any:
        """The forward of tokens that follow those of a key-value cache."""
        past = TransformerLensKeyValueCache.init_cache(self.cfg, self.cfg.device, len(new)) if past is None else past
        whole, start = said_so_far(past, new), past.previous_attention_mask.shape[1]
        with self.watched_run(whole):
            residual, images = self.embed_prompts(new)
            residual = self.run_blocks(residual, whole, past=past, start=start, images=images)
            result = self.read_out(residual, new, None if return_type is None else "logits", logits_at=logits_at)
        if not past.frozen:
            past.append_attention_mask(new.attention_mask)
            past.prompt = whole  # the images' places and the padding, which the next tokens' positions depend on  # pyright: ignore[reportAttributeAccessIssue]
        return (result, past) if return_type == "logits_and_cache" else result

    @contextmanager
    def watched_run(self, inputs: Inputs) -> Iterator[None]:
        """The context in which prompts are run, with checks for faults that would otherwise pass unnoticed.

        Raises:
            ValueError: numbers that are not finite, or a hook that reads a cached activation of prompts of another shape.
            RuntimeError: another thread has hooks on this model, which would act on this run.
        """
        if others := set(self._hooking_threads) - {threading.get_ident()}:
            raise RuntimeError(
                f"{len(others)} other threads have hooks on this model, and they would act on this run: give each thread a model of "
                f"its own (copy.deepcopy), or take turns."
            )
        token = running_prompt.set(inputs.prompt_shape)
        try:
            with finite_check():
                yield
        finally:
            running_prompt.reset(token)

    @contextmanager
    def hooks(self, fwd_hooks: Any = (), bwd_hooks: Any = (), *args: Any, **kwargs: Any) -> Iterator[HookedQwen2VL]:
        """TransformerLens's context of temporary hooks. While they are on, only the thread that added them may run the model.

        Raises:
            ValueError: there is no hook point of a name.
        """
        forward, backward = (
            [(own, hook) for name, hook in hooks for own in hooked(name, self.hook_dict)] for hooks in (fwd_hooks, bwd_hooks)
        )
        thread = threading.get_ident()
        self._hooking_threads.append(thread)
        try:
            with super().hooks(forward, backward, *args, **kwargs):  # pyright: ignore[reportArgumentType] (lists of pairs are invariant)
                yield self
        finally:
            self._hooking_threads.remove(thread)

    def embed_prompts(
        self, inputs: Inputs
    ) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "stream image_token d_model"] | None]:
        """(the residual stream before the first block, the image embeddings and DeepStack terms: see `image_streams`)."""
        images = self.image_streams(inputs)
        embedded = merge(self.embed(inputs.tokens), None if images is None else images[0], inputs)
        return self.hook_embed(embedded), images

    def run_blocks(
        self,
        residual: Float[Tensor, "rows pos d_model"],
        inputs: Inputs,
        layers: range | None = None,
        past: TransformerLensKeyValueCache | None = None,
        start: int = 0,
        images: Float[Tensor, "stream image_token d_model"] | None = None,
        hidden: Bool[Tensor, "rows pos"] | None = None,
    ) -> Float[Tensor, "rows pos d_model"]:
        """The residual stream after some blocks of the decoder, DeepStack's additions to the first blocks included.

        Args:
            residual: the stream before the first of these blocks, at positions `start`, `start` + 1, … of the prompts. It may
                hold several copies of the batch, one after another (such as the cells of a patching sweep).
            layers: the blocks to run; None for all.
            past: keys and values of the positions before `start`.
            images: image embeddings and DeepStack terms of these prompts, or of every copy of them; None takes them from the
                prompts, or runs the tower, if DeepStack needs them.
            hidden: mask over positions 0 up to the stream's last: positions to which no other position attends.
        Raises:
            ValueError: the stream is not finite; the error names the first block after which it was not.
        """
        running = RunningPositions(start, start + residual.shape[1], self.cfg.n_layers, hidden)
        layers = range(self.cfg.n_layers) if layers is None else layers
        added = self._deepstack(residual, inputs, layers, slice(start, running.stop), images)
        rotation, visible = self._surroundings(residual, inputs, running)
        with finite_check() as check, running_at(running):
            check.note(residual, "hook_embed" if layers.start == 0 else f"the stream before blocks.{layers.start}")
            for layer in layers:
                past_of_layer = None if past is None else to_its_device(past.entries[layer], self.blocks[layer])
                n_left = len(running.left)
                residual = self.blocks[layer](residual, rotation, visible, past_of_layer)
                if layer in added:
                    residual = residual + self.blocks[layer].hook_deepstack(running.kept(added[layer]).to(residual.device))
                    running.add_to_left(added[layer], n_left)
                if running.hidden is not hidden:  # a hook let positions leave the stream
                    hidden = running.hidden
                    rotation, visible = self._surroundings(residual, inputs, running)
                check.note(residual, f"blocks.{layer}")
        return running.restored(residual)

    def _surroundings(self, residual: Float[Tensor, "rows pos d_model"], inputs: Inputs, running: RunningPositions) -> tuple[Any, Causal]:
        """(rotary embeddings of the stream's positions, the causal mask: which keys each of them may attend to)."""
        text, copies = self.cfg.text, len(residual) // len(inputs)
        position_ids = running.kept(inputs.position_ids[..., running.start : running.stop], -1).repeat(1, copies, 1).to(residual.device)
        rotation = text_rotation(position_ids, text.rotary_base, text.d_head, text.mrope_section, residual.dtype, text.mrope_interleaved)
        seen = inputs.attention_mask[:, : running.stop].bool().repeat(copies, 1).to(residual.device)
        hidden = running.hidden
        if hidden is not None:
            seen, hidden = (mask[:, running.keys] for mask in (seen, hidden.to(residual.device)))
        seen, hidden = seen if inputs.has_padding else None, hidden if hidden is not None and bool(hidden.any()) else None
        visible = Causal(len(running.queries), len(running.keys), residual.device, seen, hidden)
        return rotation, visible

    def _deepstack(
        self,
        residual: Float[Tensor, "rows pos d_model"],
        inputs: Inputs,
        layers: range,
        positions: slice,
        images: Float[Tensor, "stream image_token d_model"] | None,
    ) -> dict[int, Float[Tensor, "rows pos d_model"]]:
        """Layer -> what DeepStack adds after the block. Without image tokens among the positions there is nothing to add: zeros
        for blocks whose `hook_deepstack` has a hook, no entry for the others."""
        merged = [layer for layer in layers if layer < len(self.cfg.vision.deepstack_layers)]
        if not merged:
            return {}
        if not bool((inputs.token_types[:, positions] > 0).any()):
            return {l: torch.zeros_like(residual) for l in merged if listened(self.blocks[l].hook_deepstack)}
        images = self.image_streams(inputs) if images is None else images
        terms = deepstack_terms(images, inputs, len(residual) // len(inputs), positions, residual)
        return {layer: terms[layer] for layer in merged}

    def read_out(
        self,
        residual: Float[Tensor, "batch pos d_model"],
        inputs: Inputs | None = None,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        logits_at: int | slice | None = None,
    ) -> Any:
        """Applies the final norm and the unembedding and returns logits or loss; other arguments as in `forward`.

        Args:
            residual: the stream after the last block, without the final norm.
            inputs: the prompts, which the loss needs.
        """
        if logits_at is not None:
            if return_type in ("loss", "both"):
                raise ValueError("the loss needs the logits of every position: leave logits_at=None.")
            residual = residual[:, _keep_axis(logits_at, residual.shape[1])]
        normalized = self.ln_final(residual)
        if return_type is None:
            return None
        logits = self.unembed(normalized)
        if return_type == "logits":
            return logits
        loss = self.loss_fn(logits, cast(Any, inputs), per_token=loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        tokens: Inputs | str | list[str] | Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        per_token: bool = False,
    ) -> Float[Tensor, ""] | Float[Tensor, "batch pos-1"]:
        """Next-token cross-entropy in nats, in float32.

        Targets are the answer's tokens where there is an answer, else every text token; image placeholders
        and padding are never targets.

        Args:
            tokens: the prompts that gave the logits, in any form that the model takes. attention_mask: for token ids only.
        Raises:
            ValueError: there is no target, or the logits are not of these prompts.
        """
        inputs = self.as_inputs(tokens, attention_mask)
        if logits.shape[:2] != inputs.shape:
            raise ValueError(f"expected logits [batch pos d_vocab] of the prompts {tuple(inputs.shape)}, got {tuple(logits.shape)}.")
        targets = inputs.labels
        if targets is None:
            is_text = (inputs.token_types == 0) & inputs.attention_mask.bool()
            targets = inputs.tokens.masked_fill(~is_text, -100)
        predicted = inputs.attention_mask[:, :-1].bool()  # a padded position predicts nothing
        targets = targets[:, 1:].masked_fill(~predicted, -100).to(logits.device)
        if not (targets != -100).any():
            raise ValueError("there is nothing to predict: the prompt has no text token after its first position.")
        wide = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
        losses = F.cross_entropy(wide.transpose(1, 2), targets, reduction="none", ignore_index=-100)
        return losses if per_token else losses.sum() / (targets != -100).sum()

    def _layers(self, start: int | None, stop: int | None) -> range:
        n_layers = self.cfg.n_layers
        for name, layer in (("start_at_layer", start), ("stop_at_layer", stop)):
            if layer is not None and not -n_layers <= layer <= n_layers:
                raise ValueError(f"{name} must be in {-n_layers}..{n_layers}, got {layer}.")
        return range(n_layers)[slice(start, stop)]

    def _resume(
        self, residual: Any, inputs: Inputs | None, attention_mask: Tensor | None, padding_side: str | None
    ) -> tuple[Inputs, Tensor]:
        """(the prompts, the residual stream to start from); the stream is copied, because hooks may write in place."""
        if not isinstance(residual, Tensor) or residual.ndim != 3 or residual.shape[-1] != self.cfg.d_model:
            raise ValueError(f"start_at_layer takes a residual stream [batch, pos, {self.cfg.d_model}].")
        if inputs is None:
            raise ValueError(
                "start_at_layer needs inputs=: without them the M-RoPE positions of the images and the padding are "
                "unknown, and the numbers would be wrong."
            )
        inputs = self.as_inputs(inputs, attention_mask, padding_side=padding_side)
        if residual.shape[:2] != inputs.shape:
            raise ValueError(f"the residual stream is {tuple(residual.shape)} but the inputs are {tuple(inputs.shape)}.")
        return inputs, residual.to(self.cfg.device).clone()

    # ---- caching ------------------------------------------------------------------------------

    def run_with_cache(
        self,
        input: Any,
        *args: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        names_filter: NamesFilter = None,
        vision: bool = False,
        device: torch.device | str | None = None,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Slice | SliceInput = None,
        **kwargs: Any,
    ) -> tuple[Any, HookedCache | dict[str, Tensor]]:
        """Runs the model; returns (the result of `forward`, the cached activations).

        Args:
            names_filter: which activations to cache (a name, names, or a predicate). None caches the text side and the
                projector, without `hook_result` and the split inputs unless their `cfg.use_*` flag is set.
            vision: with names_filter=None, also cache the tower.
            pos_slice: positions to keep, on the text side only; the tower's activations are never sliced.
            return_cache_object, remove_batch_dim, device, incl_bwd, reset_hooks_end, clear_contexts: as in
                TransformerLens.
        Raises:
            ValueError: the cache will not fit in the free memory (see `cache_size`; docs/scale.md says how to keep less).
        """
        kwargs = inspect.signature(self.forward).bind(input, *args, **kwargs).arguments
        input = kwargs.pop("input")
        if kwargs.get("start_at_layer") is None:
            input = self.as_inputs(input, *(kwargs.pop(name, None) for name in ("attention_mask", "prepend_bos", "padding_side")))
        names_filter = self._default_names(input, vision) if names_filter is None else names_filter
        if remove_batch_dim:
            refuse_several(input)
        self._require_hooks(names_filter)
        if isinstance(input, Inputs):
            require_room(self.cache_size(input, names_filter, pos_slice=pos_slice), device or str(self.cfg.device))
        # Activations of a model on several devices are moved to one, so that the cache can stack them.
        device = self.cfg.device if device is None and n_devices(self) > 1 else device
        result, cache = super().run_with_cache(
            input,
            names_filter=names_filter,
            device=cast(Any, device),
            remove_batch_dim=remove_batch_dim,
            incl_bwd=incl_bwd,
            reset_hooks_end=reset_hooks_end,
            clear_contexts=clear_contexts,
            pos_slice=pos_slice,
            **kwargs,
        )
        if not return_cache_object:
            return result, cache
        prompts = input if isinstance(input, Inputs) else kwargs.get("inputs")
        shape = prompts.prompt_shape if isinstance(prompts, Inputs) else None
        on_a_past = kwargs.get("past_kv_cache") is not None or kwargs.get("past_key_values") is not None
        if shape is not None and (pos_slice is not None or on_a_past):  # its positions are not all of the prompt's
            shape = replace(shape, sliced=True)
        return result, HookedCache(cache, self, has_batch_dim=not remove_batch_dim, prompt_shape=shape)

    def cache_size(
        self, input: Any, names_filter: NamesFilter = None, vision: bool = False, pos_slice: Slice | SliceInput = None
    ) -> CacheSize:
        """Bytes that `run_with_cache` would cache, computed from shapes without a run; `by_hook` has the bytes of each hook.

        Args:
            names_filter, vision, pos_slice: as `run_with_cache` takes them.
        """
        input = self.as_inputs(input)
        names_filter = self._default_names(input, vision) if names_filter is None else names_filter
        return cache_size(self, input, chosen(names_filter, self.hook_dict), pos_slice)

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Slice | SliceInput = None,
    ) -> tuple[dict[str, Tensor], list, list]:
        """As in TransformerLens; `pos_slice` and `remove_batch_dim` apply to the text side only, the tower's activations stay whole."""
        cache = {} if cache is None else cache
        positions = Slice.unwrap(pos_slice)

        def save(tensor: Tensor, hook: HookPoint, suffix: str) -> None:
            stored = tensor.detach()
            name = str(hook.name)
            if not is_vision(name):
                if (running := running_positions.get()) is not None:
                    stored = running.at_all_positions(stored, *position_axes(name))
                stored = positions.apply(stored, dim=position_axes(name)[0])
                stored = stored[0] if remove_batch_dim and stored.shape[0] == 1 else stored
            stored = stored.to(device)
            # A view of a few positions would keep all the others in memory.
            smaller = stored.untyped_storage().nbytes() > stored.nbytes
            cache[name + suffix] = stored.clone() if pos_slice is not None and smaller else stored

        names = chosen(self._default_names(None, False) if names_filter is None else names_filter, self.hook_dict)
        forward = [(name, partial(save, suffix="")) for name in names]
        backward = [(name, partial(save, suffix="_grad")) for name in names] if incl_bwd else []
        self.is_caching = True
        return cache, forward, backward

    def add_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Adds caching hooks that stay until `reset_hooks`; `names_filter` as in `run_with_cache`."""
        cache, forward, backward = self.get_caching_hooks(names_filter, incl_bwd, device, remove_batch_dim, cache)
        for hooks, direction in ((forward, "fwd"), (backward, "bwd")):
            for name, hook in hooks:
                self.add_hook(name, hook, dir=direction)
        return cache

    def _default_names(self, input: Any, vision: bool) -> Callable[[str], bool]:
        """Which activations are cached with names_filter=None; see `run_with_cache`."""
        flags, prefix = self.cfg, [hook.name for hook in self.vision_projector.out_hooks]
        encoded = isinstance(input, Inputs) and self.is_encoded(input)  # pyright: ignore[reportArgumentType, reportCallIssue] (torch.compiler.disable)

        def wanted(name: str) -> bool:
            if is_vision(name):
                of_projector = name.startswith("vision_projector.")
                return vision or (of_projector and (not encoded or name in prefix))
            if name == LOGITS_HOOK:
                return False
            if name.endswith("hook_result"):
                return flags.use_attn_result
            if name.endswith(_SPLIT_INPUTS):
                return flags.use_split_qkv_input
            if name.endswith("hook_attn_in"):
                return flags.use_attn_in
            return not name.endswith("hook_mlp_in") or flags.use_hook_mlp_in

        return wanted

    def _require_hooks(self, names_filter: NamesFilter) -> None:
        if not callable(names_filter):
            require([names_filter] if isinstance(names_filter, str) else names_filter or [], self.hook_dict)

    def process_weights(
        self,
        fold_ln: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        *,
        verbose: bool = False,
        center_writing_weights: bool | None = None,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """Folds and centres weights; the log-probabilities stay the same. The model is changed in place, shared tensors are not.

        Args:
            fold_ln, center_unembed, fold_value_biases: as in TransformerLens; see `weight_processing`.
            verbose: show a progress bar over the blocks.
            center_writing_weights: True warns and does nothing, as in TransformerLens: an RMS norm does not subtract the mean, so
                centring the weights would change the model.
        Raises:
            ValueError: refactor_factored_attn_matrices=True, which TransformerLens refuses too for rotary positions.
        """
        if refactor_factored_attn_matrices:
            raise ValueError(
                "refactor_factored_attn_matrices=True cannot be had: queries and keys are rotated between the two factors, so they "
                "have no product of their own; leave it False."
            )
        if center_writing_weights:
            warnings.warn(
                "center_writing_weights does nothing here: RMS norms take no mean away, so centred weights would be another model.",
                stacklevel=2,
            )
        self._require_present("processing")
        process_weights(self, fold_ln, center_unembed, fold_value_biases, verbose)

    def export_text_model(self, folder: str | Path) -> Path:
        """Writes the text decoder as a Qwen2 folder; see `export`."""
        self._require_present("exporting")
        return export_text_model(self, folder)

    # ---- TransformerLens's switches -----------------------------------------------------------

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether a default cache holds each head's contribution; the hook itself is always there."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Whether a default cache holds each head's own query, key and value inputs."""
        self._refuse_both(use_split_qkv_input, "use_split_qkv_input", "use_attn_in")
        self.cfg.use_split_qkv_input = use_split_qkv_input

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Whether a default cache holds each head's own attention input."""
        self._refuse_both(use_attn_in, "use_attn_in", "use_split_qkv_input")
        self.cfg.use_attn_in = use_attn_in

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Whether a default cache holds the MLP's input (`hook_mlp_in`)."""
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    def _refuse_both(self, on: bool, flag: str, other: str) -> None:
        if on and getattr(self.cfg, other):
            raise ValueError(f"{flag} and {other} exclude each other, as in TransformerLens: turn {other} off first.")


def _say_adapted(cfg: HookedQwen2VLConfig, adapter: str, weights: dict[str, Tensor]) -> None:
    """Writes a merged adapter into the configuration: into the model's name, and untied embeddings if the head is now another matrix."""
    cfg.adapter, cfg.model_name = adapter, f"{cfg.model_name} + {adapter}"
    head, embedding = weights.get("lm_head.weight"), weights["model.language_model.embed_tokens.weight"]
    if head is not None and head.data_ptr() != embedding.data_ptr() and not torch.equal(head, embedding):
        cfg.text = replace(cfg.text, tie_word_embeddings=False)


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"unknown dtype {dtype!r}: expected 'float32', 'bfloat16', 'float16', 'float64', or None for the checkpoint's own."
        )
    return found


def _keep_axis(position: int | slice, length: int) -> slice:
    if isinstance(position, slice):
        return position
    if not -length <= position < length:
        raise ValueError(f"logits_at is {position}, the sequence has {length} positions.")
    position %= length
    return slice(position, position + 1)
