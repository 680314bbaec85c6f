"""The documents of one split to tokens in a file, a batch at a time, counting words and bytes on the way."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import cast

from transformers import PreTrainedTokenizerFast

from deq_lm.data.token_file import TokenWriter
from deq_lm.data.tokenizers import encode_documents, word_level

_BATCH_CHARACTERS = 1 << 20
# A newline between visible characters: the tokenizers here encode what is before and after it apart anyway.
_SAFE_CUT = re.compile(r"(?<=\S)\n(?=\S)")


@dataclass
class SplitCounts:
    """What `EncodedSplit` says about the text of its tokens."""

    num_tokens: int = 0
    num_words: int = 0
    num_bytes: int = 0
    num_unknown: int = 0

    def to_mapping(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)


def encode_split(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerFast, writer: TokenWriter, *, lines_count_as_words: bool
) -> SplitCounts:
    """Write an end-of-sequence token and the tokens of all documents, each followed by an end-of-sequence token.

    A word-level tokenizer puts that token after each line by itself; there none is added.

    Args:
        documents: read once; not held together in memory.
        tokenizer: has an end-of-sequence token.
        writer: takes the tokens.
        lines_count_as_words: whether the end of a line adds to the words.

    Raises:
        DataError: what reading the documents and `encode_documents` raise.
    """
    counts = SplitCounts()
    eos = cast(int, tokenizer.eos_token_id)
    unknown = cast(int | None, tokenizer.unk_token_id)

    def counted() -> Iterator[str]:
        for document in documents:
            counts.num_words += sum(len(words) for words in word_level.words_by_line(document))
            if lines_count_as_words:
                counts.num_words += document.count("\n") + (not document.endswith("\n"))
            counts.num_bytes += len(document.encode())
            yield document

    writer.append([eos])
    for batch in _batches(counted(), ends_lines=word_level.ends_lines(tokenizer)):
        encoded = encode_documents(tokenizer, [text for text, _ in batch])
        for ids, (_, needs_eos) in zip(encoded, batch, strict=True):
            writer.append([*ids, eos] if needs_eos else ids)
            counts.num_unknown += 0 if unknown is None else ids.count(unknown)
    counts.num_tokens = writer.num_tokens - 1
    return counts


def _batches(documents: Iterable[str], *, ends_lines: bool) -> Iterator[list[tuple[str, bool]]]:
    """Texts to encode together, about a million characters, each with whether an end-of-sequence token is to follow.

    A long document comes in pieces, because the tokens of a text take far more memory than its characters.
    """
    batch: list[tuple[str, bool]] = []
    size = 0
    for document in documents:
        if ends_lines and not document.endswith("\n"):
            document += "\n"  # so that the last line ends like the others
        start = 0
        while start < len(document):
            cut = _SAFE_CUT.search(document, start + _BATCH_CHARACTERS)
            end = len(document) if cut is None else cut.end()
            batch.append((document[start:end], not ends_lines and end == len(document)))
            size += end - start
            start = end
            if size >= _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
