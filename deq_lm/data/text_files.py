"""Text files as streams of documents: strict UTF-8, lines that end in \\n, articles found by their `= Title =` line.

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
_TITLE = re.compile(r" ?= (?!=)[^\n]*(?<!=) = ?\n?")


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, plain or `.xz`, each with its "\\n".

    A line ends at "\\n" or "\\r\\n" (which becomes "\\n") and nowhere else: a lone "\\r", U+0085 and U+2028 stay inside
    their line. A byte order mark at the start is dropped. The last line may lack its "\\n".

    Raises:
        DataError: the file cannot be opened or decompressed, is not UTF-8, or has a NUL; names the file and, for its
            content, the byte offset (in the decompressed text of an `.xz`).
    """
    offset = 0
    try:
        with _open(path) as file:
            for line in file:
                text = line.removeprefix(codecs.BOM_UTF8) if offset == 0 else line
                if b"\0" in text:
                    raise DataError(
                        f"{path}: NUL at byte {offset + line.index(0)}: expected UTF-8 text. If the file is UTF-16, convert "
                        "it: iconv -f UTF-16 -t UTF-8."
                    )
                yield text.decode("utf-8").replace("\r\n", "\n")
                offset += len(line)
    except UnicodeDecodeError as error:
        start = offset + error.start + (len(line) - len(text))
        raise DataError(
            f"{path}: byte {start} is not UTF-8 ({error.reason}). Convert the file, for example with iconv -f LATIN1 "
            "-t UTF-8."
        ) from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read: {error or 'damaged xz file'}.") from error


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
            has_text = has_text or not document.isspace()
            yield document
        if not has_text:
            raise DataError(f"{self.path}: the {self.split} split has no text. Give a file with words in it.")


def split_file(path: Path) -> dict[str, FileDocuments]:
    """One file cut into contiguous train, valid and test portions of 90, 5 and 5 % of its characters.

    The two cuts fall on the first start of a document at or after 90 % and 95 %. Where that leaves a portion empty (a text
    without titles, or with very few), they fall on the first start of a line instead.

    Raises:
        DataError: the file has too few lines for three portions, or what `read_lines` raises.
    """
    sizes, document_starts = array("Q"), array("Q")
    for number, (line, starts_document) in enumerate(_mark_starts(read_lines(path))):
        sizes.append(len(line))
        if starts_document:
            document_starts.append(number)
    ends = np.cumsum(np.frombuffer(sizes, np.uint64)) if sizes else np.zeros(0, np.uint64)
    for starts in (np.frombuffer(document_starts, np.uint64) if document_starts else [], range(1, len(ends))):
        line_numbers = np.asarray(starts, dtype=np.int64)
        # characters before a line: the end of the one before it
        places = ends[line_numbers - 1]
        first, second = (np.searchsorted(places, share * float(ends[-1])) if sizes else 0 for share in (0.90, 0.95))
        second = max(second, first + 1)
        if second < len(line_numbers):
            cuts = [0, int(line_numbers[first]), int(line_numbers[second]), None]
            return {
                split: FileDocuments(path, split, cast(int, cuts[i]), cuts[i + 1])
                for i, split in enumerate(SPLITS)
            }
    raise DataError(
        f"{path}: {len(sizes)} lines are too few to be cut into train, valid and test. Give a longer text, or a folder with "
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
        raise DataError(f"{path}: cannot be read: {error}.") from error


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".xz":
        # Lines of an LZMAFile are read by a slow Python method; a BufferedReader around it is twice as fast.
        return io.BufferedReader(cast(io.RawIOBase, lzma.open(path)), 1 << 20)
    return path.open("rb")


def _mark_starts(lines: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Each line, and whether a new document starts at it (never at the first text, which needs no mark)."""
    after_blank, has_text = True, False
    for line in lines:
        is_blank = line.isspace()
        yield line, after_blank and has_text and _TITLE.fullmatch(line) is not None
        after_blank, has_text = is_blank, has_text or not is_blank
