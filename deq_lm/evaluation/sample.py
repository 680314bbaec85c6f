"""Text the model writes, the same for the same seed."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from deq_lm.data.tokenizers import encode_documents
from deq_lm.evaluation.config import EvaluationConfig
from deq_lm.evaluation.modes import device_of, measuring, seeded
from deq_lm.modeling import DEQLMForCausalLM, EquilibriumCache


@dataclass(frozen=True)
class Sample:
    """A prompt and its continuation.

    Attributes:
        prompt, text: as they are; `printable` makes them safe for a terminal.
        num_evaluations: of the solve that predicted each token of `text`; None where nothing is solved, or no cache kept.
    """

    prompt: str
    text: str
    num_evaluations: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        num_tokens: how many, at least 1.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: only so many of the most likely tokens; 0 is all.
        top_p: only the most likely tokens that together have this probability, in (0, 1]; 1 is all.
        max_evaluations: compute of a token, in evaluations of the cell; None is the model's own.
        stop_at_end: end at an end-of-document token, instead of writing on after it.
        seed: of the random numbers, 0 to 2^64 - 1.

    Raises:
        ValueError: if a value is out of range.
    """

    num_tokens: int = 60
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_evaluations: int | None = None
    stop_at_end: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens={self.num_tokens}: expected 1 or more.")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: expected 0 (the most likely token) or more.")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: expected 0 (all tokens) or more.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p}: expected a probability in (0, 1]; 1 is all tokens.")
        if self.max_evaluations is not None and not 1 <= self.max_evaluations <= 2**31:
            raise ValueError(f"max_evaluations={self.max_evaluations}: expected 1 to 2^31.")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed}: expected 0 to 2^64 - 1.")


def sample_text(
    model: DEQLMForCausalLM, tokenizer: PreTrainedTokenizerFast, config: EvaluationConfig, *, seed: int = 0
) -> Sample:
    """Continue `config.sample_prompt` by `config.sample_tokens` tokens drawn from the model."""
    decoding = Decoding(num_tokens=config.sample_tokens, temperature=config.sample_temperature, seed=seed)
    return write_text(model, tokenizer, config.sample_prompt, decoding)


def write_text(
    model: DEQLMForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    decoding: Decoding,
    *,
    on_text: Callable[[str, int | None], None] | None = None,
) -> Sample:
    """Continue `prompt`, at the start of a document.

    Args:
        model: in any mode; it is left in that.
        tokenizer: its own.
        prompt: may be empty.
        decoding: how tokens are chosen.
        on_text: told each piece of text as soon as it is there, and the evaluations of the solve that predicted its last
            token (None as in `Sample`).
    """
    (ids,) = encode_documents(tokenizer, [prompt])
    device = device_of(model)
    context = torch.tensor([[tokenizer.eos_token_id, *ids]], device=device)
    cache = EquilibriumCache() if model.config.use_cache else None
    drawn = {"temperature": decoding.temperature, "top_k": decoding.top_k, "top_p": decoding.top_p}
    generation = GenerationConfig(
        do_sample=decoding.temperature > 0,
        **(drawn if decoding.temperature > 0 else {}),
        max_new_tokens=decoding.num_tokens,
        use_cache=cache is not None,
        # a window at a time: what a long prompt takes grows with its length, not with the square of it
        prefill_chunk_size=None if cache is None else model.config.mem_len or None,
        # an id that is never drawn; None would be replaced by the model's own
        eos_token_id=tokenizer.eos_token_id if decoding.stop_at_end else model.config.vocab_size,
        pad_token_id=tokenizer.eos_token_id,
    )
    options = {"past_key_values": cache, "max_evaluations": decoding.max_evaluations}
    with measuring(model), seeded(decoding.seed, device):
        made = model.generate(
            context,
            attention_mask=torch.ones_like(context),
            generation_config=generation,
            streamer=None if on_text is None else _Streamer(tokenizer, context.shape[1], cache, on_text),
            **{name: value for name, value in options.items() if value is not None},
        )
    counts = None if cache is None else cache.num_evaluations
    if counts is not None:
        counts = tuple(counts[0, context.shape[1] - 1 :].tolist())  # a position predicts the token after it
    return Sample(prompt, str(tokenizer.decode(made[0, context.shape[1] :])), counts)


class _Streamer(BaseStreamer):
    """Hands on text token by token, together where several tokens make one character."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        prompt_length: int,
        cache: EquilibriumCache | None,
        on_text: Callable[[str, int | None], None],
    ) -> None:
        self._tokenizer, self._cache, self._on_text = tokenizer, cache, on_text
        self._awaited = prompt_length  # the library puts the prompt first
        self._decoder = DecodeStream([], False)
        self._ids: list[int] = []
        self._num_given = 0  # characters

    def put(self, value: Tensor) -> None:
        ids = value.flatten().tolist()
        prompt, new = ids[: self._awaited], ids[self._awaited :]
        self._awaited -= len(prompt)
        for token in new:
            self._ids.append(token)
            self._give(self._decoder.step(self._tokenizer.backend_tokenizer, token))

    def end(self) -> None:
        self._give(str(self._tokenizer.decode(self._ids))[self._num_given :])  # part of a character, at the end

    def _give(self, piece: str | None) -> None:
        if piece:
            self._num_given += len(piece)
            counts = None if self._cache is None else self._cache.num_evaluations
            self._on_text(piece, None if counts is None else int(counts[0, -1]))


def printable(text: str) -> str:
    """`text` with control and invisible formatting characters, other than newlines, written as escapes.

    A terminal obeys some of them: generated text could move its cursor, or clear it.
    """
    return "".join(
        character if character == "\n" or not _is_control(character) else character.encode("unicode_escape").decode()
        for character in text
    )


def _is_control(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] == "C" or category in ("Zl", "Zp")
