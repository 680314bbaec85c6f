"""English prose found with every Python: the language reference in `pydoc_data.topics` and the library's docstrings.

About two megabytes (300,000 words) of technical English with some code in it. It depends on the version of Python and on
nothing else: not on what is installed, and not on the machine.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path

from deq_lm.errors import DataError

_SKIPPED_FOLDERS = {
    "site-packages", "dist-packages",   # not the standard library
    "test", "tests", "idle_test",       # tests hold strings that only look like documentation
    "idlelib", "lib2to3", "pydoc_data", "turtledemo",   # programs and data
    "encodings",    # a hundred near-copies of one sentence
}  # fmt: skip
_MIN_DOCSTRING_WORDS = 8
_MIN_REPEATED_WORDS = 8
_MIN_DOCUMENT_WORDS = 50


@dataclass(frozen=True)
class StandardLibraryProse:
    """The documents of one split, in the order of their names.

    A document is one topic of the language reference, or all docstrings of one module. The sha256 of its name decides
    the split (90, 5 and 5 of 100), so a document never moves when others come and go.
    """

    split: str

    def __iter__(self) -> Iterator[str]:
        """Yields the documents.

        Raises:
            DataError: this Python lacks the sources of its standard library.
        """
        return (text for name, text in _documents().items() if split_of(name) == self.split)


def split_of(name: str) -> str:
    """The split a document of this name belongs to."""
    # Of a few prefixes tried, this one lets the large modules fall so that sizes, too, are near 90, 5 and 5.
    share = int.from_bytes(hashlib.sha256(f"prose/{name}".encode()).digest()[:8]) % 100
    return "train" if share < 90 else "valid" if share < 95 else "test"


def source_digest() -> str:
    """sha256 over all the prose is extracted from, this file included; far cheaper than extracting it.

    Raises:
        DataError: this Python lacks the sources of its standard library.
    """
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for name, text in sorted(_topics().items()):
        digest.update(f"{name}\0{text}\0".encode())
    for name, path in _source_files().items():
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _documents() -> Mapping[str, str]:
    """Document by name, sorted by name, no paragraph twice."""
    modules = {name: _docstrings(path.read_bytes()) for name, path in _source_files().items()}
    seen: set[str] = set()
    texts: dict[str, str] = {}
    # The chapters of the reference contain its sections, which are topics too: shortest first, so that a repeated
    # paragraph stays with its section, and what is in one split is not in another.
    for name, text in sorted(_topics().items(), key=lambda item: (len(item[1]), item[0])):
        texts[f"topics/{name}"] = _drop_repeated_paragraphs(text, seen)
    for name, docstrings in modules.items():
        texts[name] = _drop_repeated_paragraphs("\n\n".join(docstrings), seen)
    return {name: text + "\n" for name, text in sorted(texts.items()) if len(text.split()) >= _MIN_DOCUMENT_WORDS}


def _docstrings(source: bytes) -> list[str]:
    """The docstrings of a module, its classes and its functions, in the order of the source."""
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring.split()) >= _MIN_DOCSTRING_WORDS:
                found.append(docstring)
        for child in ast.iter_child_nodes(node):
            # A definition may stand under `if` and `try`, never inside an expression.
            if isinstance(child, ast.stmt | ast.ExceptHandler):
                visit(child)

    visit(ast.parse(source))
    return found


def _drop_repeated_paragraphs(text: str, seen: set[str]) -> str:
    """`text` without the longer paragraphs that are in `seen`, to which its own are added."""
    kept = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        words = paragraph.split()
        key = " ".join(words)
        if len(words) < _MIN_REPEATED_WORDS or key not in seen:
            kept.append(paragraph)
            seen.add(key)
    return "\n\n".join(kept).strip()


def _topics() -> Mapping[str, str]:
    try:
        return import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError(_incomplete("pydoc_data.topics is missing")) from error


def _source_files() -> dict[str, Path]:
    """The modules of the standard library by their path below it, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    paths: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - _SKIPPED_FOLDERS  # in place: os.walk enters what is left
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    if not paths:
        raise DataError(_incomplete(f"{root} has no .py files"))
    return dict(sorted((path.relative_to(root).as_posix(), path) for path in paths))


def _incomplete(what: str) -> str:
    return (
        f"corpus builtin: {what}. It needs a Python with the sources of its standard library; install one, or use the "
        "corpus text with your own files."
    )
