"""The documents of one split to tokens in a file, a batch at a time, counting words and bytes on the way."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
from transformers import PreTrainedTokenizerFast

from deq_lm.data.documents import Documents
from deq_lm.data.token_file import TokenWriter
from deq_lm.data.tokenizers import encode_documents, word_level

_BATCH_CHARACTERS = 1 << 20
# A newline between visible characters: the tokenizers here encode what is before and after it apart anyway.
_SAFE_CUT = re.compile(r"(?<=\S)\n(?=\S)")


@dataclass(frozen=True)
class SplitCounts:
    """What a prepared folder says about the text of the tokens of a split; see `EncodedSplit`."""

    num_tokens: int
    num_words: int
    num_bytes: int
    num_unknown: int
    documents_fingerprint: str


class _Piece(NamedTuple):
    """Text to encode at once: of which document, and whether it is the last of it."""

    text: str
    document: int
    is_last: bool


def encode_split(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerFast, writer: TokenWriter, *, lines_count_as_words: bool
) -> tuple[SplitCounts, Documents]:
    """Write an end-of-sequence token and the tokens of all documents, each followed by an end-of-sequence token.

    A word-level tokenizer puts that token after each line by itself; there none is added.

    Args:
        documents: read once; not held together in memory.
        tokenizer: has an end-of-sequence token.
        writer: takes the tokens.
        lines_count_as_words: whether the end of a line adds to the words.

    Returns:
        The counts of the split, and those of its documents.

    Raises:
        DataError: what reading the documents and `encode_documents` raise.
    """
    eos = cast(int, tokenizer.eos_token_id)
    unknown = cast(int | None, tokenizer.unk_token_id)
    ends_lines = word_level.ends_lines(tokenizer)
    num_tokens: list[int] = []
    num_words: list[int] = []
    num_bytes: list[int] = []
    num_unknown = 0
    fingerprint = hashlib.sha256()

    def counted() -> Iterator[str]:
        for document in documents:
            words = sum(len(words) for words in word_level.words_by_line(document))
            lines = document.count("\n") + (not document.endswith("\n"))
            text = document.encode()
            num_tokens.append(0)
            num_words.append(words + (lines if lines_count_as_words else 0))
            num_bytes.append(len(text))
            fingerprint.update(hashlib.sha256(text).digest())
            yield document

    writer.append([eos])
    for batch in _batches(counted(), ends_lines=ends_lines):
        encoded = encode_documents(tokenizer, [piece.text for piece in batch])
        for ids, piece in zip(encoded, batch, strict=True):
            found = [*ids, eos] if piece.is_last and not ends_lines else ids
            writer.append(found)
            num_tokens[piece.document] += len(found)
            num_unknown += 0 if unknown is None else ids.count(unknown)
    counts = SplitCounts(sum(num_tokens), sum(num_words), sum(num_bytes), num_unknown, fingerprint.hexdigest())
    arrays = {
        name: np.array(values, dtype=np.int64)
        for name, values in (("num_tokens", num_tokens), ("num_words", num_words), ("num_bytes", num_bytes))
    }
    return counts, Documents(**arrays, fingerprint=counts.documents_fingerprint)


def _batches(documents: Iterable[str], *, ends_lines: bool) -> Iterator[list[_Piece]]:
    """Texts to encode together, about a million characters.

    A long document comes in pieces, because the tokens of a text take far more memory than its characters.
    """
    batch: list[_Piece] = []
    size = 0
    for number, document in enumerate(documents):
        if ends_lines and not document.endswith("\n"):
            document += "\n"  # so that the last line ends like the others
        start = 0
        while start < len(document):
            cut = _SAFE_CUT.search(document, start + _BATCH_CHARACTERS)
            end = len(document) if cut is None else cut.end()
            batch.append(_Piece(document[start:end], number, end == len(document)))
            size += end - start
            start = end
            if size >= _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
