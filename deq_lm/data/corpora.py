"""The corpora by name: `builtin`, `text`, and WikiText; each three splits of documents that can be read again and again."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deq_lm.data.standard_library import StandardLibraryProse, source_digest
from deq_lm.data.text_files import SPLITS, FileDocuments, documents, file_digest, split_file
from deq_lm.errors import ConfigError, DataError, UnusedSettingWarning

HUB_REPOSITORY = "Salesforce/wikitext"
HUB_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
_HUB_CONFIGURATIONS = {
    "wikitext-103": "wikitext-103-v1",
    "wikitext-103-raw": "wikitext-103-raw-v1",
    "wikitext-2": "wikitext-2-v1",
    "wikitext-2-raw": "wikitext-2-raw-v1",
}
PUBLISHED_WORDS: Mapping[str, Mapping[str, int]] = {
    "wikitext-103": {"train": 103_227_021, "valid": 217_646, "test": 245_569},
    "wikitext-2": {"train": 2_088_628, "valid": 217_646, "test": 245_569},
}
"""Words of each split as perplexities are published for them, `<eos>` of each line included (Merity et al. 2017)."""

PUBLISHED_VOCABULARY = {"wikitext-103": 267_735}
"""Different words of the training split, `<eos>` included (Dai et al. 2019)."""

KNOWN_SHA256: Mapping[str, Mapping[str, str]] = {
    "wikitext-103": {
        "valid": "9aee9f52d6e77de6c7751fc5e7c44287db3ec0eaf15477098acc6b93c1c4250b",
        "test": "56db52eb157b1ab5c89646eef70510c1eca6e12a3bfdb99f0d6b05b4eacb75b9",
    },
}
"""Of the text of the original wiki.{valid,test}.tokens, which the hub's rows joined have to be. Not known for the other
splits and corpora: of those, the pinned commit and the published counts are all there is."""

CORPUS_NAMES = ("builtin", "text", *_HUB_CONFIGURATIONS)
_PROBE_SECONDS = 2


@dataclass(frozen=True)
class Split:
    """The documents of one split.

    Attributes:
        documents: texts; every iteration starts anew, from the disk where they are many.
    """

    documents: Iterable[str]


@dataclass(frozen=True)
class Corpus:
    """A text in three splits.

    Attributes:
        name: one of `CORPUS_NAMES`.
        splits: "train", "valid" and "test".
        lines_count_as_words: whether the end of a line counts as a word, the convention of WikiText's published counts.
        fingerprint: digits that change when the text does.
    """

    name: str
    splits: Mapping[str, Split]
    lines_count_as_words: bool
    fingerprint: str


def load_corpus(name: str, *, data_dir: str | Path | None = None) -> Corpus:
    """A corpus by name; its text is read when its documents are iterated.

    - `builtin`: English prose found with every Python (`deq_lm.data.standard_library`); takes no `data_dir`.
    - `text`: `data_dir` is a folder with train.txt, valid.txt and test.txt (or .txt.xz), or one text file, which is cut
      into contiguous portions of 90, 5 and 5 % (`deq_lm.data.text_files.split_file`).
    - `wikitext-103`, `wikitext-2` (word level, with `<unk>`) and `wikitext-103-raw`, `wikitext-2-raw`: `data_dir` is a
      folder with wiki.{train,valid,test}.tokens (or .raw, or without the `wiki.`); without it, they are fetched from the
      Hugging Face hub at a pinned revision.

    Raises:
        ConfigError: an unknown name, or `text` without `data_dir`.
        DataError: files are missing or ambiguous, the hub cannot be reached, or `datasets` is not installed.
    """
    if name == "builtin":
        if data_dir is not None:
            warnings.warn(f"corpus builtin takes no data_dir; {data_dir} is not read.", UnusedSettingWarning)
        splits = {split: Split(StandardLibraryProse(split)) for split in SPLITS}
        return Corpus(name, splits, lines_count_as_words=False, fingerprint=source_digest())
    if name == "text":
        if data_dir is None:
            raise ConfigError("corpus text: no data_dir was given. Set it to a text file or a folder with train.txt, "
                              "valid.txt and test.txt.")  # fmt: skip
        path = Path(data_dir)
        files = _split_files(path, ("{}.txt", "{}.txt.xz")) if path.is_dir() else split_file(path)
        return _from_files(name, files, lines_count_as_words=False)
    if name in _HUB_CONFIGURATIONS:
        if data_dir is None:
            return _from_hub(name)
        suffix = "raw" if name.endswith("-raw") else "tokens"
        files = _split_files(Path(data_dir), (f"wiki.{{}}.{suffix}", f"{{}}.{suffix}"))
        return _from_files(name, files, lines_count_as_words=True)
    raise ConfigError(f"corpus {name!r} is not known. Choose one of {', '.join(CORPUS_NAMES)}.")


def _split_files(folder: Path, patterns: tuple[str, ...]) -> dict[str, FileDocuments]:
    """The one file a split in `folder`, named by one of the patterns."""
    files: dict[str, FileDocuments] = {}
    for split in SPLITS:
        names = [pattern.format(split) for pattern in patterns]
        found = [name for name in names if (folder / name).is_file()]
        if len(found) != 1:
            problem = "there is none" if not found else "there are both"
            raise DataError(f"{folder}: the {split} split is {' or '.join(names)}, and {problem}. Give exactly one.")
        path = folder / found[0]
        if not path.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{path}: is a link to {path.resolve()}, outside the folder. Put the file itself there.")
        files[split] = FileDocuments(path, split)
    return files


def _from_files(name: str, files: Mapping[str, FileDocuments], *, lines_count_as_words: bool) -> Corpus:
    # One file may stand for all three splits: the lines of each belong to the fingerprint, and one digest a path suffices.
    digests = {path: file_digest(path) for path in {file.path for file in files.values()}}
    parts = [(split, digests[file.path], file.first_line, file.end_line) for split, file in files.items()]
    fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()
    splits = {split: Split(file) for split, file in files.items()}
    return Corpus(name, splits, lines_count_as_words, fingerprint)


@dataclass(frozen=True)
class _HubDocuments:
    """The documents of a split on the hub, whose rows are the lines of the original file.

    Attributes:
        rows: as `datasets` gives them.
        name: of corpus and split, for messages.
        sha256: of the whole text; None where it is not known.
    """

    rows: Any
    name: str
    sha256: str | None

    def __iter__(self) -> Iterator[str]:
        """Yields the documents in order.

        Raises:
            DataError: at the end, the text was not the one it has to be.
        """
        return documents(self._lines())

    def _lines(self) -> Iterator[str]:
        digest = hashlib.sha256()
        # The hub has "" where the file has a blank line, which is " \n"; with it, both give the same text and counts.
        for text in (text or " \n" for batch in self.rows.iter(batch_size=1000) for text in batch["text"]):
            line = text if text.endswith("\n") else text + "\n"
            digest.update(line.encode())
            yield line
        if self.sha256 not in (None, digest.hexdigest()):
            raise DataError(
                f"{self.name}: what the hub gave has the SHA-256 {digest.hexdigest()}, and the original {self.sha256}. "
                "Empty the cache of datasets and fetch it again, or give data_dir, a folder with wiki.*.tokens."
            )


def _from_hub(name: str) -> Corpus:
    remedy = (
        "Give data_dir, a folder with wiki.{train,valid,test}.tokens (.raw for the raw corpora), or use the corpus text "
        "with your own files, or builtin, which needs neither."
    )
    # Without the probe, datasets would try again for half a minute. With HF_HUB_OFFLINE it reads its cache at once.
    is_offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    if not is_offline and not _hub_answers():
        raise DataError(
            f"corpus {name}: the Hugging Face hub cannot be reached. {remedy} If an earlier download is in the local "
            "cache, set HF_HUB_OFFLINE=1."
        )
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise DataError(
            f"corpus {name}: the package datasets is not installed: pip install datasets. {remedy}"
        ) from error
    configuration = _HUB_CONFIGURATIONS[name]
    try:
        loaded = datasets.load_dataset(HUB_REPOSITORY, configuration, revision=HUB_REVISION)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"corpus {name}: the hub gave no {HUB_REPOSITORY} ({configuration}): {error}. {remedy}"
        ) from error
    hub_names = {"train": "train", "valid": "validation", "test": "test"}
    known = KNOWN_SHA256.get(name, {})
    splits = {
        split: Split(_HubDocuments(loaded[hub_names[split]], f"the {split} split of {name}", known.get(split)))
        for split in SPLITS
    }
    return Corpus(name, splits, lines_count_as_words=True, fingerprint=f"{HUB_REVISION}/{configuration}")


def _hub_answers() -> bool:
    """Whether the hub (or HF_ENDPOINT, through a proxy where one is set) answers anything within two seconds."""
    url = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not url.startswith(("https://", "http://")):
        return False
    try:
        # its scheme has been looked at
        request = urllib.request.Request(url, method="HEAD")  # noqa: S310
        urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()  # noqa: S310  # nosec B310
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True
