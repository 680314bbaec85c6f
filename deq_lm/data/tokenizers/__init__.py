"""Tokenizers by kind: train one on a corpus, load one from a folder, encode documents with either.

All are `transformers.PreTrainedTokenizerFast`, so that `save_pretrained` puts them beside a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from deq_lm.data.corpora import Corpus
from deq_lm.data.tokenizers import bpe, sentencepiece, word_level
from deq_lm.errors import ConfigError, DataError
from deq_lm.structure import nearest

TokenizerKind = Literal["bpe", "word_level", "sentencepiece"]
TOKENIZER_KINDS: tuple[str, ...] = get_args(TokenizerKind)


def train_tokenizer(kind: str, corpus: Corpus, vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer made from the training split of `corpus` and nothing else.

    Args:
        kind: "bpe" and "sentencepiece" are lossless and have the end of text `<|endoftext|>`; "word_level" has whole
            words and `<eos>` after each line.
        corpus: its training split is read once.
        vocab_size: number of entries; "word_level" also takes None, for all words.

    Raises:
        ConfigError: an unknown kind, no `vocab_size` where one is needed, or one out of range.
        DataError: the text cannot be read, or gives no vocabulary of that size.
    """
    if kind not in TOKENIZER_KINDS:
        raise ConfigError(f"tokenizer {kind!r} is not known. Choose one of {', '.join(TOKENIZER_KINDS)}.")
    documents = corpus.splits["train"].documents
    if kind == "word_level":
        return _for_generation(word_level.train(documents, vocab_size))
    if vocab_size is None:
        raise ConfigError(f"tokenizer {kind}: no vocab_size was given. Set one, such as 8192.")
    return _for_generation((bpe if kind == "bpe" else sentencepiece).train(documents, vocab_size))


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer that `save_pretrained` wrote to `folder`; nothing is fetched and no code in the folder is run.

    Raises:
        DataError: no tokenizer.json there, an unreadable one, or a tokenizer without an end-of-sequence token.
    """
    if not Path(folder, "tokenizer.json").is_file():
        raise DataError(
            f"{folder}: no folder with a tokenizer.json, as save_pretrained writes it, and no kind of tokenizer"
            f"{nearest(str(folder), TOKENIZER_KINDS)}"
        )
    try:
        # a folder; nothing is downloaded
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)  # nosec B615
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"{folder}: tokenizer.json cannot be read ({error}). Save the tokenizer again.") from error
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{folder}: the tokenizer has no end-of-sequence token, which ends each document. Set eos_token."
        )
    return _for_generation(tokenizer)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """`save_pretrained`.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(f"tokenizer.json: {error}") from error  # tokenizers raises plain Exception


def _for_generation(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """With what the library needs to write with it: prompts of a batch are padded on the left, and the end of one document
    begins the next and stands for padding, unless the tokenizer has tokens for these."""
    tokenizer.padding_side = "left"
    tokenizer.init_kwargs["padding_side"] = "left"  # of what save_pretrained writes
    for name in ("bos_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            setattr(tokenizer, name, tokenizer.eos_token)
    return tokenizer


def vocabulary_hash(tokenizer: PreTrainedTokenizerFast) -> hashlib._Hash:
    """The SHA-256 of the entries and their ids, that is, of which text an id stands for."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text as it stands, without special tokens added.

    What is merely spelled like a special token stays text, so a document cannot end itself; a word-level tokenizer puts
    `<eos>` for each newline.

    Raises:
        DataError: a text for a word-level tokenizer has `<eos>` written in it.
    """
    if word_level.ends_lines(tokenizer):
        for text in texts:
            word_level.refuse_written_eos(text)
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before
