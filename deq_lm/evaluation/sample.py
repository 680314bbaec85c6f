"""A short text the model writes, the same for the same seed."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from deq_lm.data.tokenizers import encode_documents
from deq_lm.evaluation.config import EvaluationConfig
from deq_lm.evaluation.modes import device_of, measuring, seeded
from deq_lm.modeling import DEQLMForCausalLM


@dataclass(frozen=True)
class Sample:
    """A prompt and its continuation, both as they are: `printable` makes them safe for a terminal."""

    prompt: str
    text: str


def sample_text(
    model: DEQLMForCausalLM, tokenizer: PreTrainedTokenizerFast, config: EvaluationConfig, *, seed: int = 0
) -> Sample:
    """Continue `config.sample_prompt`, at the start of a document, by `config.sample_tokens` tokens drawn from the model.

    An end-of-document token is drawn like any other and does not end the sample.
    """
    (prompt,) = encode_documents(tokenizer, [config.sample_prompt])
    device = device_of(model)
    context = torch.tensor([[tokenizer.eos_token_id, *prompt]], device=device)
    generation = GenerationConfig(
        do_sample=True,
        temperature=config.sample_temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=config.sample_tokens,
        eos_token_id=model.config.vocab_size,  # never drawn; None would be replaced by the model's own
        pad_token_id=tokenizer.eos_token_id,
    )
    with measuring(model), seeded(seed, device):
        made = model.generate(  # pyright: ignore[reportAttributeAccessIssue]  (the library's own protocol)
            context, attention_mask=torch.ones_like(context), generation_config=generation
        )
    return Sample(config.sample_prompt, str(tokenizer.decode(made[0, context.shape[1] :])))


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
