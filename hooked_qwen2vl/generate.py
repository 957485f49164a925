"""Generation with a key-value cache, with hooks, and always with the images.

The prompt runs once (the prefill), then one position per step. Hooks act at every step: activations are `[batch, prompt, …]` in
the prefill and `[batch, 1, …]` afterwards. A generated token is text, even if its id is the one of an image placeholder.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry
from transformer_lens.utilities import sample_logits
from transformers import StoppingCriteria, StoppingCriteriaList

from .cache import HookedCache, heads_first, position_axes
from .hook_names import is_vision
from .inputs import Inputs
from .mixin import Mixin
from .overflow import FiniteCheck, finite_check
from .running import running_positions

SPARE = 128  # free positions in a new buffer of keys and values
Hooks = Sequence[tuple[str | Callable[[str], bool], Callable]]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; greedy unless `do_sample`."""

    do_sample: bool = True
    top_k: int | None = None
    top_p: float | None = None
    temperature: float = 1.0
    freq_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_p is not None:
            raise ValueError("top_k and top_p exclude each other, as in TransformerLens: pass one.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")
        if self.temperature < 0 or self.freq_penalty < 0 or self.repetition_penalty <= 0:
            raise ValueError("temperature and freq_penalty must not be negative, repetition_penalty must be positive.")

    def choose(self, logits: Float[Tensor, "batch d_vocab"], sequence: Inputs, step: int) -> Int[Tensor, "batch"]:
        """The next token of each row; with a seed, other uses of random numbers do not affect it."""
        temperature = self.temperature if self.do_sample else 0.0
        logits, tokens = logits.float(), sequence.tokens
        penalised = self.freq_penalty > 0 or self.repetition_penalty != 1
        if penalised and sequence.has_padding:  # count padding in an extra column, so that its token is not penalised
            tokens = tokens.masked_fill(sequence.attention_mask == 0, logits.shape[-1])
            logits = torch.nn.functional.pad(logits, (0, 1), value=float("-inf"))
        with _seeded(None if self.seed is None else self.seed * 1_000_003 + step, logits.device):
            return sample_logits(
                logits,
                top_k=self.top_k,
                top_p=self.top_p,
                temperature=temperature,
                freq_penalty=self.freq_penalty,
                repetition_penalty=self.repetition_penalty,
                tokens=tokens,
            )


class Generation(Mixin):
    """Mixed into HookedQwen2VL."""

    @torch.no_grad()
    def generate(
        self,
        input: Inputs | str | list[str] | Int[Tensor, "batch pos"] = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        return_type: Literal["input", "str", "tokens", "inputs"] = "input",
        verbose: bool = True,
        output_logits: bool = False,
        return_cache: bool = False,
        return_input_tokens: bool = False,
        names_filter: Any = None,
        device: torch.device | str | None = None,
        pixel_values: None = None,
        stop_strings: str | Sequence[str] | None = None,
        stopping_criteria: Any = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        forced_bos_token_id: None = None,
        *,
        fwd_hooks: Hooks = (),
        seed: int | None = None,
    ) -> Any:
        """Continues each prompt; the arguments are TransformerLens's (as there, the default is to sample).

        Args:
            prepend_bos, padding_side, attention_mask: of the prompt, see `as_inputs`; generation pads on the left.
            eos_token_id: tokens that end a row; None: from the checkpoint's generation settings.
            use_past_kv_cache: False runs the whole sequence again at every step: the same tokens, slower.
            return_type: "tokens": [batch pos+new], prompt included, rows that ended earlier filled with the padding token;
                "inputs": the same as `Inputs`, with the new tokens as segment `answer`; "str": the text, without the prompt if
                `input` is `Inputs`, else with it, as in TransformerLens; "input": the same type as `input`.
            fwd_hooks: hooks for this call, at the prefill and at every step.
            return_cache: also return the activations of `names_filter` for prompt and generated tokens, as they were when these
                tokens ran (after hooks), on `device`.
            output_logits: return transformers' `GenerateDecoderOnlyOutput`, whatever the return_type; `sequences` are the tokens,
                `logits` the logits of each new token, [batch d_vocab] each.
            return_input_tokens: also return the prompt's tokens as they were run, [batch pos].
            stop_strings: a row stops after the token that completes one of them; [] has no effect.
            stopping_criteria: transformers' criteria, called with (tokens, logits of the last token).
            pixel_values, forced_bos_token_id: refused; images are part of `Inputs`, and Qwen has no BOS.
            seed: makes sampling repeatable.
        Returns:
            the continuation; with return_cache or return_input_tokens the tuple (continuation, HookedCache, tokens) of those asked for.
        Raises:
            ValueError: a continuation longer than the context, contradictory sampling settings, placeholders without images, or a
                refused argument.
        """
        if return_type not in ("input", "str", "tokens", "inputs"):
            raise ValueError(f"return_type must be 'input', 'str', 'tokens' or 'inputs', got {return_type!r}.")
        if pixel_values is not None:
            raise ValueError("pixel_values= is not taken: pass model.to_inputs(prompt, images=[…]), which carries the images.")
        _refuse_forced_bos(forced_bos_token_id)
        prompt = self.as_inputs(input, attention_mask, prepend_bos, padding_side).left_padded()
        sampling = Sampling(do_sample, top_k, top_p, temperature, freq_penalty, repetition_penalty, seed)
        stop = self._stopping(stop_at_eos, eos_token_id, stop_strings, stopping_criteria)
        collector = self._collector(input, names_filter, device) if return_cache else None
        hooks = list(fwd_hooks) + (collector.hooks if collector else [])
        done, kept = prompt, []
        with self.hooks(fwd_hooks=hooks):
            steps = self._steps(prompt, max_new_tokens, sampling, stop, use_past_kv_cache, collector)
            for done, logits in _progress(steps, max_new_tokens, verbose):
                kept += [logits] if output_logits else []
        if output_logits:
            from transformers.generation import GenerateDecoderOnlyOutput  # slow: it loads all that transformers generates with

            output = GenerateDecoderOnlyOutput(sequences=done.tokens, logits=tuple(kept))
        else:
            output = self._as_asked(input, prompt, done, return_type)
        more = [HookedCache(collector.joined(), self, prompt_shape=done.prompt_shape)] if collector else []
        more += [prompt.tokens] if return_input_tokens else []
        return (output, *more) if more else output

    @torch.no_grad()
    def generate_stream(
        self,
        input: Inputs | str | list[str] | Int[Tensor, "batch pos"] = "",
        max_new_tokens: int = 10,
        max_tokens_per_yield: int = 25,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        return_type: Literal["input", "str", "tokens"] = "input",
        verbose: bool = True,
        stop_strings: str | Sequence[str] | None = None,
        stopping_criteria: Any = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        forced_bos_token_id: None = None,
        *,
        fwd_hooks: Hooks = (),
        seed: int | None = None,
    ) -> Iterator[Int[Tensor, "batch new"] | str | list[str]]:
        """`generate` in chunks; joined, they are what `generate` returns as tokens or text, with the prompt in the first chunk.

        Hooks are on the model only while the generator computes the next chunk.

        Args:
            max_tokens_per_yield: number of tokens after which a chunk is yielded; the first chunk includes the prompt's tokens, as
                in TransformerLens. 1 yields every token.
            return_type: "tokens": [batch new]; "str": text, or a list of texts for several prompts (without the prompts if `input` is
                `Inputs`); "input": text for text and `Inputs`, tokens for tokens. Incomplete characters are held back.
        Raises:
            ValueError: as `generate`.
        """
        if return_type not in ("input", "str", "tokens"):
            raise ValueError(f"return_type must be 'input', 'str' or 'tokens', got {return_type!r}.")
        if max_tokens_per_yield < 1:
            raise ValueError(f"max_tokens_per_yield must be at least 1, got {max_tokens_per_yield}.")
        _refuse_forced_bos(forced_bos_token_id)
        as_text = not isinstance(input, Tensor) if return_type == "input" else return_type == "str"
        prompt = self.as_inputs(input, attention_mask, prepend_bos, padding_side).left_padded()
        sampling = Sampling(do_sample, top_k, top_p, temperature, freq_penalty, repetition_penalty, seed)
        stop = self._stopping(stop_at_eos, eos_token_id, stop_strings, stopping_criteria)
        steps = self._steps(prompt, max_new_tokens, sampling, stop, use_past_kv_cache, None)
        steps = iter(_progress(steps, max_new_tokens, verbose))
        given, said, done = 0, [""] * len(prompt), prompt
        while True:
            with self.hooks(fwd_hooks=list(fwd_hooks)), torch.no_grad():
                following, _ = next(steps, (None, None))
            ended, done = following is None, done if following is None else following
            if ended or done.shape[1] - given >= max_tokens_per_yield:
                if as_text:
                    texts = self._answer_text(prompt, done) if isinstance(input, Inputs) else self._row_texts(done)
                    texts = texts if ended else [text.rstrip("\ufffd") for text in texts]  # hold back incomplete characters
                    chunk = [text[len(before) :] for text, before in zip(texts, said)]
                    said = texts
                    if any(chunk):
                        yield chunk if len(chunk) > 1 else chunk[0]
                elif done.shape[1] > given:
                    yield done.tokens[:, given:]
                given = done.shape[1]
            if ended:
                return

    # ---- the loop -----------------------------------------------------------------------------

    def _steps(
        self,
        prompt: Inputs,
        max_new_tokens: int,
        sampling: Sampling,
        stop: Callable[[Tensor, Tensor], Bool[Tensor, "batch"]],
        use_past_kv_cache: bool,
        collector: Collector | None,
    ) -> Iterator[tuple[Inputs, Float[Tensor, "batch d_vocab"]]]:
        """(the sequence with one more token, the logits that it was chosen from) at each step, until all rows have stopped."""
        if max_new_tokens < 0 or prompt.shape[1] + max_new_tokens > self.cfg.n_ctx:
            raise ValueError(
                f"the prompt has {prompt.shape[1]} tokens and {max_new_tokens} more do not fit the context of "
                f"{self.cfg.n_ctx}: ask for between 0 and {self.cfg.n_ctx - prompt.shape[1]}."
            )
        if not max_new_tokens:
            return
        past = None
        if use_past_kv_cache:
            entries: list[Any] = [KeysAndValues.init_cache_entry(self.cfg, self.cfg.device, len(prompt)) for _ in self.blocks]
            past = TransformerLensKeyValueCache(entries, prompt.attention_mask[:, :0])
        elif prompt.visuals and not self.tower_is_listened_to():
            prompt = self.encode(prompt)
        running = torch.ones(len(prompt), dtype=torch.bool, device=prompt.device)
        alive, sequence = [True] * len(prompt), prompt
        check, logits = self._next_logits(prompt, prompt, past)
        for step in range(max_new_tokens):
            if sampling.do_sample:
                check.ask()  # before torch refuses to sample, with an unclear error
            chosen = sampling.choose(logits, sequence, step)
            chosen = torch.where(running, chosen, self._fill_id())
            sequence = sequence.extend(chosen, running, alive)
            running = running & ~stop(sequence.tokens, logits)
            flags = torch.cat((check.flags().to(running.device), running)).tolist()  # the only transfer to the host per step
            check.judge(flags[: -len(prompt)])
            yield sequence, logits
            alive = flags[-len(prompt) :]
            last = not any(alive) or step == max_new_tokens - 1
            if not last or collector is not None:  # the last token runs only for the cache
                check, logits = self._next_logits(sequence, prompt, past)
            if last:
                return check.ask()

    def _next_logits(
        self, sequence: Inputs, prompt: Inputs, past: TransformerLensKeyValueCache | None
    ) -> tuple[FiniteCheck, Float[Tensor, "batch d_vocab"]]:
        """(check for finite numbers, logits of the next token), from the whole sequence, or its last position and the past."""
        with finite_check(ask=False) as check, self.watched_run(prompt):
            if past is None or sequence is prompt:
                start, (residual, images) = 0, self.embed_prompts(sequence)
            else:
                start, images = sequence.shape[1] - 1, None
                residual = self.hook_embed(self.embed(sequence.tokens[:, -1:]))
            residual = self.run_blocks(residual, sequence, past=past, start=start, images=images)
            logits = self.unembed(self.ln_final(residual)[:, -1:])[:, 0].to(sequence.device)  # ln_final's hooks see every position
        return check, logits

    # ---- stopping, and what comes back --------------------------------------------------------

    def _stopping(
        self, stop_at_eos: bool, eos_token_id: Any, stop_strings: Any, stopping_criteria: Any
    ) -> Callable[[Tensor, Tensor], Bool[Tensor, "batch"]]:
        """A function (tokens, logits) -> [batch] whether each row has stopped."""
        eos = self.cfg.special.eos if eos_token_id is None else eos_token_id
        eos = [eos] if isinstance(eos, int) else list(eos)
        if stop_at_eos and not eos:
            raise ValueError("this checkpoint names no end token: pass eos_token_id= or stop_at_eos=False.")
        criteria = StoppingCriteriaList()
        strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
        if any(strings):
            criteria.append(StopStrings(self._tokenizer(), [string for string in strings if string]))
        if stopping_criteria is not None:
            several = isinstance(stopping_criteria, (list, tuple))
            criteria.extend(stopping_criteria if several else [stopping_criteria])

        ends = torch.tensor(eos, device=self.cfg.device)

        def stop(tokens: Tensor, logits: Tensor) -> Tensor:
            stopped = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
            if stop_at_eos:
                stopped = torch.isin(tokens[:, -1], ends)
            for criterion in criteria:
                stopped = stopped | torch.as_tensor(criterion(tokens, logits), device=tokens.device)
            return stopped

        return stop

    def _fill_id(self) -> int:
        """The token that fills a row after its end."""
        special = self.cfg.special
        return special.pad if special.pad is not None else (special.eos or (0,))[0]

    def _as_asked(self, input: Any, prompt: Inputs, done: Inputs, return_type: str) -> Any:
        if return_type == "input":
            kinds = {Inputs: "inputs", str: "str", list: "str", tuple: "str"}
            return_type = next((kind for of, kind in kinds.items() if isinstance(input, of)), "tokens")
        if return_type == "inputs":
            return done
        if return_type == "tokens":
            return done.tokens
        if isinstance(input, Inputs):
            texts = self._answer_text(prompt, done)
            return texts[0] if len(texts) == 1 else texts
        texts = self._row_texts(done)
        return texts if len(texts) > 1 else texts[0]

    def _row_texts(self, done: Inputs) -> list[str]:
        """The text of each row, with the prompt, without special tokens."""
        return [self._decode(row.tokens[0][row.attention_mask[0].bool()]) for row in done]

    def _answer_text(self, prompt: Inputs, done: Inputs) -> list[str]:
        """The text of each row's new tokens, without special tokens."""
        new = slice(prompt.shape[1], None)
        return [self._decode(row.tokens[0, new][row.attention_mask[0, new].bool()]) for row in done]

    def _decode(self, tokens: Int[Tensor, "pos"]) -> str:
        return self._tokenizer().decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _collector(self, input: Any, names_filter: Any, device: Any) -> Collector:
        names = self._default_names(input, False) if names_filter is None else names_filter
        self._require_hooks(names)
        return Collector(self, names, device)


def said_so_far(past: Any, new: Inputs) -> Inputs:
    """The prompts of a key-value cache, extended by the new tokens.

    Raises:
        ValueError: not a TransformerLensKeyValueCache, one that another model filled, one of a run from which tokens were dropped,
            another batch size, or new images.
    """
    if not isinstance(past, TransformerLensKeyValueCache):
        raise ValueError(
            f"past_kv_cache= takes a TransformerLensKeyValueCache (transformer_lens.cache.key_value_cache), or what "
            f"return_type='logits_and_cache' gave; got {type(past).__name__}."
        )
    n_rows, n_past = past.previous_attention_mask.shape
    if n_rows != len(new):
        raise ValueError(f"the past_kv_cache is of {n_rows} prompts, the new tokens of {len(new)}.")
    prompt = getattr(past, "prompt", None)
    filled = {entry.past_keys.shape[1] for entry in past.entries}
    if len(filled) > 1 and prompt is not None and max(filled) == n_past:
        raise ValueError(
            f"the blocks of this past_kv_cache hold {' and '.join(map(str, sorted(filled)))} positions: tokens were dropped from its run, and "
            f"what follows cannot be run by hand. model.generate, within the same interventions, runs prompt and answer."
        )
    if filled != {n_past} or (n_past and (prompt is None or prompt.shape[1] != n_past)):
        raise ValueError("this past_kv_cache holds positions that no run of this model put there: begin with an empty one.")
    if not n_past:
        return new
    if new.visuals:
        raise ValueError("images can come only with the first tokens of a past_kv_cache.")
    for position in range(new.shape[1]):
        prompt = prompt.extend(new.tokens[:, position], new.attention_mask[:, position].bool())
    return cast(Any, prompt)


class StopStrings(StoppingCriteria):
    """Stops rows whose last token completes a stop string, as transformers' `StopStringCriteria` does.

    transformers' class processes the whole vocabulary at every call of `generate`; this one decodes the last few tokens.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]):
        self.tokenizer, self.strings = tokenizer, strings
        self.window = max(len(string.encode()) for string in strings) + 1  # a token has at least one byte

    def __call__(self, tokens: Int[Tensor, "batch pos"], logits: Any = None, **unused: Any) -> Bool[Tensor, "batch"]:
        stopped = [self._ends_in(row) for row in tokens[:, -self.window :].tolist()]
        return torch.tensor(stopped, dtype=torch.bool, device=tokens.device)

    def _ends_in(self, row: list[int]) -> bool:
        before, text = (self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (row[:-1], row))
        old = len(os.path.commonprefix([before, text]))  # the last token may complete a character
        return any(string in text[max(0, old - len(string) + 1) :] for string in self.strings)


class KeysAndValues(TransformerLensKeyValueCacheEntry):
    """TransformerLens's cache entry with a buffer that has free positions, so that appending a token copies only its key and value.

    The memory layout is head by head, as attention reads it. Earlier results of `append` stay valid.
    """

    buffer: Any = None  # [2 batch head capacity d_head]

    def append(
        self, new_keys: Float[Tensor, "batch new head d_head"], new_values: Float[Tensor, "batch new head d_head"]
    ) -> tuple[Float[Tensor, "batch pos head d_head"], Float[Tensor, "batch pos head d_head"]]:
        if self.frozen:
            return super().append(new_keys, new_values)
        start = self.past_keys.shape[1]
        end = start + new_keys.shape[1]
        if self.buffer is None or self.buffer.shape[3] < end:
            batch, _, heads, d_head = new_keys.shape
            self.buffer = new_keys.new_empty((2, batch, heads, end + SPARE, d_head))
            self._write(0, start, self.past_keys, self.past_values)
        self._write(start, end, new_keys, new_values)
        self.past_keys, self.past_values = self.buffer[:, :, :, :end].transpose(2, 3)
        return self.past_keys, self.past_values

    def _write(self, start: int, end: int, *keys_and_values: Float[Tensor, "batch pos head d_head"]) -> None:
        for buffer, given in zip(self.buffer, keys_and_values):
            buffer[:, :, start:end] = given.transpose(1, 2)


class Collector:
    """Collects activations over prefill and steps, and concatenates them along the position axis."""

    def __init__(self, model: Any, names_filter: Any, device: Any):
        self.chunks: dict[str, list[Tensor]] = {}
        cache, self.hooks, _ = model.get_caching_hooks(names_filter, device=device)
        self.hooks = [(name, self._save(device)) for name, _ in self.hooks]

    def _save(self, device: Any) -> Callable:
        def save(tensor: Tensor, hook: Any) -> None:
            if not is_vision(hook.name) and (running := running_positions.get()) is not None:
                tensor = running.at_all_positions(tensor, *position_axes(hook.name))
            self.chunks.setdefault(hook.name, []).append(tensor.detach().to(device))

        return save

    def joined(self) -> dict[str, Tensor]:
        """Hook name -> activation at all positions; without a key-value cache this is the activation of the last run."""
        return {name: self._join(name, chunks) for name, chunks in self.chunks.items()}

    @staticmethod
    def _join(name: str, chunks: list[Tensor]) -> Tensor:
        if is_vision(name):
            return chunks[-1]
        if not name.endswith(("hook_attn_scores", "hook_pattern")):
            axis = 2 if heads_first(name) else 1
            grown = len(chunks) > 1 and chunks[-1].shape[axis] > 1
            return chunks[-1] if grown else torch.cat(chunks, dim=axis)
        if len(chunks) > 1 and chunks[-1].shape[-2] > 1:
            return chunks[-1]
        n_keys = max(chunk.shape[-1] for chunk in chunks)
        unseen = 0.0 if name.endswith("hook_pattern") else float("-inf")
        padded = [torch.nn.functional.pad(c, (0, n_keys - c.shape[-1]), value=unseen) for c in chunks]
        return torch.cat(padded, dim=-2)


def _progress(steps: Iterator, total: int, verbose: bool) -> Iterable:
    return tqdm(steps, total=total, disable=not verbose, delay=1, desc="generating", unit="token")


def _refuse_forced_bos(token: Any) -> None:
    if token is not None:
        raise ValueError("forced_bos_token_id= is for encoder-decoder models: a Qwen2-VL has no BOS; drop the argument.")


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
