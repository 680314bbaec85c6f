"""One .npy file of tokens, written in chunks of unknown number and read through a memory map."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np


class TokenWriter:
    """Appends tokens to a new .npy file, as uint16 where the vocabulary allows it and as uint32 otherwise.

    The length stands at the head of the file and is known at the end only; numpy's header leaves room for any length, so
    it is written twice.

    Args:
        path: the file, replaced if it exists.
        vocab_size: one more than the largest token.
    """

    def __init__(self, path: Path, *, vocab_size: int) -> None:
        self.num_tokens = 0
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._digest = hashlib.sha256()
        self._file = path.open("wb")

    def __enter__(self) -> TokenWriter:
        self._write_header()
        return self

    def append(self, tokens: Sequence[int]) -> None:
        """Write more tokens."""
        data = np.asarray(tokens, dtype=self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.num_tokens += len(tokens)

    @property
    def digest(self) -> bytes:
        """sha256 of the tokens so far."""
        return self._digest.digest()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                self._file.seek(0)
                self._write_header()

    def _write_header(self) -> None:
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self.num_tokens,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def read_tokens(path: Path, num_tokens: int) -> np.ndarray:
    """The tokens of a file, mapped and read-only.

    Raises:
        ValueError: not `num_tokens` of them, or not a whole .npy file.
        OSError: the file cannot be opened.
    """
    tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    if tokens.shape != (num_tokens,):
        raise ValueError(f"{path.name} holds {tokens.shape} tokens instead of {num_tokens}")
    return tokens
