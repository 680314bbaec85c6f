"""Text files as streams of documents: strict UTF-8, lines that end in a newline, articles found by their `= Title =`.

Nothing here reads a whole file at once; a document is the largest thing held in memory.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import lzma
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from deq_lm.errors import DataError

SPLITS = ("train", "valid", "test")
MAX_LINE_BYTES = 1 << 28
"""Longest line that is read: one that never ends would fill the memory, and an .xz of a few kilobytes can hold it."""
_TITLE = re.compile(r" ?= (?!=)[^\n]*(?<!=) = ?\n?")


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, plain or `.xz`, each with its newline.

    A line ends at LF or CR LF (which becomes LF) and nowhere else: a lone CR, U+0085 and U+2028 stay inside their line.
    A byte order mark at the start is dropped. The last line may lack its newline.

    Raises:
        DataError: the file cannot be opened or decompressed, is not UTF-8, has a NUL or an endless line; names the file
            and, for its content, the byte offset (in the decompressed text of an `.xz`).
    """
    offset = 0
    try:
        with _open(path) as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{path}: the line at byte {offset} is longer than {MAX_LINE_BYTES:,} bytes. Break it up."
                    )
                yield _decode(line, offset, path)
                offset += len(line)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise _unreadable(path, error) from error


def documents(lines: Iterable[str]) -> Iterator[str]:
    """Lines gathered into documents; joined, they are the text again.

    A line `= Title =` (one equals sign a side, spaces inside, at most one outside) after a blank line starts a document.
    Text without such lines is one document.
    """
    gathered: list[str] = []
    for line, starts_document in _mark_starts(lines):
        if starts_document:
            yield "".join(gathered)
            gathered.clear()
        gathered.append(line)
    if gathered:
        yield "".join(gathered)


@dataclass(frozen=True)
class FileDocuments:
    """The documents of one split, read from the file anew at each iteration.

    Attributes:
        path: a UTF-8 file, `.xz` or plain.
        split: the split it stands for, named in errors.
        first_line: the first line that belongs to the split.
        end_line: the line after the last one, None for the end of the file.
    """

    path: Path
    split: str
    first_line: int = 0
    end_line: int | None = None

    def __iter__(self) -> Iterator[str]:
        """Yields the documents in order.

        Raises:
            DataError: what `read_lines` raises, or no text but white space.
        """
        has_text = False
        for document in documents(islice(read_lines(self.path), self.first_line, self.end_line)):
            has_text = has_text or (document != "" and not document.isspace())  # "" is what a byte order mark leaves
            yield document
        if not has_text:
            raise DataError(f"{self.path}: the {self.split} split has no text. Give a file with words in it.")


def split_file(path: Path) -> dict[str, FileDocuments]:
    """One file cut into contiguous train, valid and test portions of about 90, 5 and 5 % of its characters.

    The two cuts fall on the first start of a document at or after 90 % and 95 %. Where that leaves a portion empty (a text
    without titles, or with very few), they fall on the first start of a line instead.

    Raises:
        DataError: the file has too few lines for three portions, or what `read_lines` raises.
    """
    sizes, document_starts = array("q"), array("q")  # arrays, because a file may have many millions of lines
    for number, (line, starts_document) in enumerate(_mark_starts(read_lines(path))):
        sizes.append(len(line))
        if starts_document:
            document_starts.append(number)
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
    for starts in (np.asarray(document_starts, dtype=np.int64), np.arange(1, len(ends))):
        # A line starts where the one before it ends. (Line 0 is never among `starts`.)
        first, second = np.searchsorted(ends[starts - 1], [0.90 * sum(sizes), 0.95 * sum(sizes)])
        second = max(second, first + 1)
        if second < len(starts):
            a, b = int(starts[first]), int(starts[second])
            return {
                "train": FileDocuments(path, "train", 0, a),
                "valid": FileDocuments(path, "valid", a, b),
                "test": FileDocuments(path, "test", b),
            }
    raise DataError(
        f"{path}: {len(sizes)} line(s) cannot be cut into train, valid and test. Give a longer text, or a folder with "
        "train.txt, valid.txt and test.txt."
    )


def file_digest(path: Path) -> str:
    """sha256 of the bytes of a file, as hexadecimal digits.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".xz":
        # LZMAFile reads single lines through a slow Python method; a BufferedReader around it does not.
        return io.BufferedReader(cast(io.RawIOBase, lzma.open(path)), 1 << 20)
    return path.open("rb")


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or error
    return DataError(f"{path}: cannot be read ({reason}). Give a readable UTF-8 text file, plain or .xz.")


def _decode(line: bytes, offset: int, path: Path) -> str:
    if offset == 0 and line.startswith(codecs.BOM_UTF8):
        offset, line = len(codecs.BOM_UTF8), line[len(codecs.BOM_UTF8) :]
    if b"\0" in line:
        raise DataError(
            f"{path}: NUL at byte {offset + line.index(0)}; expected UTF-8 text. If this is UTF-16, convert it: "
            "iconv -f UTF-16 -t UTF-8."
        )
    try:
        return line.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {offset + error.start} is not UTF-8 ({error.reason}). Convert the file, for example: "
            "iconv -f LATIN1 -t UTF-8."
        ) from error


def _mark_starts(lines: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Each line, and whether a new document starts at it (never at the first text, which needs no mark)."""
    after_blank, has_text = True, False
    for line in lines:
        is_blank = line.isspace()
        yield line, after_blank and has_text and _TITLE.fullmatch(line) is not None
        after_blank, has_text = is_blank, has_text or not is_blank
