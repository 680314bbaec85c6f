"""What each document of a split has of tokens, words and bytes: what losses of documents are sums over, and divided by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The documents of a split, in their order; all arrays are (D,) int64.

    Attributes:
        num_tokens: targets of each, its end-of-sequence token included. They follow each other in the split's tokens.
        num_words: words of each, counted as those of the split.
        num_bytes: bytes of its UTF-8.
        fingerprint: sha256 of the texts, one after another, as hexadecimal digits: the same whatever the tokenizer.
    """

    num_tokens: np.ndarray
    num_words: np.ndarray
    num_bytes: np.ndarray
    fingerprint: str

    def __len__(self) -> int:
        return len(self.num_tokens)

    @property
    def ends(self) -> np.ndarray:
        """The target after the last of each document, (D,)."""
        return self.num_tokens.cumsum()


def write_documents(path: Path, documents: Documents) -> None:
    """Write the counts to a .npy file, a row a document; the fingerprint is not in it."""
    np.save(path, np.stack([documents.num_tokens, documents.num_words, documents.num_bytes], axis=1))


def read_documents(path: Path, fingerprint: str, *, num_tokens: int, num_words: int, num_bytes: int) -> Documents:
    """The counts in a file that `write_documents` wrote, which have to add up to those of the split.

    Raises:
        ValueError: they do not, or it is no such file.
        OSError: the file cannot be opened.
    """
    counts = np.load(path, mmap_mode="r", allow_pickle=False)
    if counts.ndim != 2 or counts.shape[1] != 3 or counts.dtype != np.int64:
        raise ValueError(f"{path.name} holds {counts.dtype} of shape {counts.shape}, not three counts a document")
    if (counts < 0).any() or counts.sum(axis=0).tolist() != [num_tokens, num_words, num_bytes]:
        raise ValueError(f"the counts in {path.name} do not add up to those of its split")
    tokens, words, size = np.array(counts).T
    return Documents(num_tokens=tokens, num_words=words, num_bytes=size, fingerprint=fingerprint)
