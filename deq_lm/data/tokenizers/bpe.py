"""Byte-level byte-pair encoding: decoding gives back any text exactly, and no text is unknown.

References:
    Sennrich et al. 2016; Radford et al. 2019 (bytes, and the pattern that keeps merges inside words).
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deq_lm.errors import ConfigError

EOS = "<|endoftext|>"
_MIN_VOCAB_SIZE = 257


def train(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with the merges that `documents` call for, which are read once.

    Args:
        documents: the training split.
        vocab_size: entries, at least 257: 256 bytes and the end-of-text token. A small text may give fewer.

    Raises:
        ConfigError: `vocab_size` is too small.
    """
    if vocab_size < _MIN_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size={vocab_size}: expected at least {_MIN_VOCAB_SIZE} for bpe, 256 bytes and {EOS}. Raise it."
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, clean_up_tokenization_spaces=False)
