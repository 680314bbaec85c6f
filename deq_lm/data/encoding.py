"""Text to token arrays on disk: one flat array a split, with its counts, made once and mapped into memory ever after.

A prepared folder holds `tokenizer/`, `train.npy`, `valid.npy`, `test.npy`, the counts of the documents in each
(`train_documents.npy` and so on), and `prepared.json` (counts, digests, settings). It is written aside and renamed, so that
it is there completely or not at all, also where two processes make it at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from deq_lm.data.corpora import CORPUS_NAMES, PUBLISHED_VOCABULARY, PUBLISHED_WORDS, Corpus, load_corpus
from deq_lm.data.documents import Documents, read_documents, write_documents
from deq_lm.data.split_encoding import SplitCounts, encode_split
from deq_lm.data.text_files import SPLITS, file_digest
from deq_lm.data.token_file import TokenWriter, read_tokens
from deq_lm.data.tokenizers import TOKENIZER_KINDS, load_tokenizer, save_tokenizer, train_tokenizer, vocabulary_hash
from deq_lm.errors import ConfigError, DataError
from deq_lm.structure import build, nearest

logger = logging.getLogger(__name__)

PREPARED = "prepared"
_FORMAT = 2  # to be raised when the same text and settings would give other tokens, or other files
_SUMMARY = "prepared.json"


@dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes tokens.

    Attributes:
        corpus: a name that `load_corpus` knows, or `prepared`: the folder `data_dir`, made by `prepare_into`.
        tokenizer: "bpe", "word_level" or "sentencepiece", trained on the training split; or a folder with a tokenizer.
        vocab_size: entries of a trained tokenizer; only "word_level" does without (all words).
        data_dir: where the corpus is; `load_corpus` says which corpora need it.
        cache_dir: where prepared folders are kept and found again.
    """

    corpus: str
    tokenizer: str
    vocab_size: int | None = None
    data_dir: str | None = None
    cache_dir: str = "cache"

    def __post_init__(self) -> None:
        names = (*CORPUS_NAMES, PREPARED)
        if self.corpus not in names:
            raise ConfigError(f"corpus {self.corpus!r} is not known{nearest(self.corpus, names)}")
        if self.corpus == PREPARED:
            if self.data_dir is None:
                raise ConfigError("corpus prepared: no data_dir was given. Set it to a prepared folder.")
        elif self.tokenizer in ("bpe", "sentencepiece") and self.vocab_size is None:
            raise ConfigError(f"tokenizer {self.tokenizer}: no vocab_size was given. Set one, such as 8192.")
        elif self.tokenizer not in TOKENIZER_KINDS and self.vocab_size is not None:
            raise ConfigError(
                f"vocab_size={self.vocab_size}: the tokenizer {self.tokenizer!r} is none of {', '.join(TOKENIZER_KINDS)} "
                "but a folder, and has its vocabulary already. Leave vocab_size out."
            )


@dataclass(frozen=True)
class EncodedSplit:
    """The tokens of one split.

    Attributes:
        tokens: 1-D unsigned integers, read-only and mapped from disk. tokens[0] is an extra end-of-sequence token, context
            for the first real one; every other is a target.
        num_words: words of the original text as `str.split()` counts, and its lines where the corpus counts them.
        num_bytes: bytes of the UTF-8 of the text (after a byte order mark was dropped and CR LF became LF).
        num_unknown: targets that are the unknown token.
        documents: what each document has of them; None if it is not known.
    """

    tokens: np.ndarray
    num_words: int
    num_bytes: int
    num_unknown: int = 0
    documents: Documents | None = None

    @property
    def num_tokens(self) -> int:
        """Targets: all tokens but the first."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class EncodedCorpus:
    """A corpus as tokens.

    Attributes:
        tokenizer: made them; its length is the vocabulary size.
        splits: "train", "valid" and "test".
        fingerprint: sha256 of the vocabulary and all tokens, as hexadecimal digits.
        caveats: what a reader of numbers measured on it has to know, a sentence each.
    """

    tokenizer: PreTrainedTokenizerFast
    splits: Mapping[str, EncodedSplit]
    fingerprint: str
    caveats: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Summary:
    """What a prepared folder says of itself."""

    format: int
    fingerprint: str
    corpus: str
    tokenizer: str
    vocab_size: int | None
    splits: Mapping[str, SplitCounts]


def prepare(config: DataConfig, cache_dir: str | Path | None = None) -> EncodedCorpus:
    """The encoded corpus, from the cache if it was prepared before from the same text with the same settings.

    A document of the corpus is followed by one end-of-sequence token; with a word-level tokenizer each line is instead.

    Args:
        config: what to prepare.
        cache_dir: instead of `config.cache_dir`.

    Raises:
        ConfigError, DataError: what `load_corpus`, `train_tokenizer` and `load_tokenizer` raise.
        DataError: the folder cannot be written or read, or a prepared corpus has another tokenizer than asked for.
    """
    if config.corpus == PREPARED:
        assert config.data_dir is not None  # by DataConfig
        return load_prepared(config.data_dir, expected=config)
    corpus = load_corpus(config.corpus, data_dir=config.data_dir)
    folder = Path(config.cache_dir if cache_dir is None else cache_dir) / _cache_name(config, corpus)
    if not _is_prepared(folder):
        try:
            _write(config, corpus, folder)
        except DataError:
            if not _is_prepared(folder):  # else another process made the same folder meanwhile
                raise
    return load_prepared(folder)


def prepare_into(config: DataConfig, folder: str | Path) -> EncodedCorpus:
    """Prepare a corpus in a folder of its own, which the corpus name `prepared` then takes as `data_dir`.

    Raises:
        DataError: the folder has something in it, or what `prepare` raises. Nothing is left behind.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DataError(f"{folder}: is there already. Give the name of a new folder, or remove this one.")
    _write(config, load_corpus(config.corpus, data_dir=config.data_dir), folder)
    return load_prepared(folder)


def load_prepared(folder: str | Path, *, expected: DataConfig | None = None) -> EncodedCorpus:
    """The encoded corpus in a prepared folder, if vocabulary and tokens are those that were written there.

    Logs a warning if its words are not as many as published for its name.

    Args:
        folder: written by `prepare` or `prepare_into`.
        expected: if given, the folder must have been made with its `tokenizer`, and where it has a `vocab_size`, have been
            made with that or have so many entries.

    Raises:
        DataError: not a prepared folder, a damaged one, or made with other settings.
    """
    folder = Path(folder)
    if not _is_prepared(folder):
        raise DataError(f"{folder}: no {_SUMMARY} there. Make a prepared folder with scripts/prepare_data.py.")
    try:
        mapping = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
        if mapping["format"] != _FORMAT:
            raise ValueError(f"format {mapping['format']}, and this deq_lm reads {_FORMAT}")
        summary = build(_Summary, mapping, _SUMMARY)
        splits = {name: _read_split(folder, name, summary.splits[name]) for name in SPLITS}
        tokenizer = load_tokenizer(folder / "tokenizer")
        for name, split in splits.items():
            if split.tokens.max() >= len(tokenizer):
                raise ValueError(f"{name}.npy has the token {split.tokens.max()}, of a vocabulary of {len(tokenizer)}")
        fingerprint = _fingerprint(tokenizer, [hashlib.sha256(split.tokens.data).digest() for split in splits.values()])
        if fingerprint != summary.fingerprint:
            raise ValueError(f"vocabulary or tokens have the SHA-256 {fingerprint} and not {summary.fingerprint}")
    except (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{folder}: the prepared data is damaged ({error}). Remove the folder and prepare again."
        ) from error
    made_with = summary.tokenizer, summary.vocab_size
    # "word_level" may have been asked for all words, and expected with as many as there were
    sizes = (None, made_with[1], len(tokenizer))
    if expected is not None and (expected.tokenizer != made_with[0] or expected.vocab_size not in sizes):
        raise DataError(
            f"{folder}: was prepared with tokenizer {made_with[0]} and vocab_size {made_with[1]} ({len(tokenizer):,} "
            f"entries), not {expected.tokenizer} and {expected.vocab_size}. Ask for those, or prepare again."
        )
    caveats = _caveats(summary.corpus, splits, tokenizer if made_with == ("word_level", None) else None)
    for caveat in caveats:
        logger.warning("%s: %s", folder, caveat)
    return EncodedCorpus(tokenizer, splits, summary.fingerprint, caveats)


def _caveats(
    corpus: str, splits: Mapping[str, EncodedSplit], all_words: PreTrainedTokenizerFast | None
) -> tuple[str, ...]:
    """What makes perplexities on a corpus other than the published ones; `all_words` is a tokenizer of all of them."""
    found = [
        f"the {name} split has {splits[name].num_words:,} words, and that of {corpus} has {published:,}"
        for name, published in PUBLISHED_WORDS.get(corpus, {}).items()
        if splits[name].num_words != published
    ]
    published = PUBLISHED_VOCABULARY.get(corpus)
    if all_words is not None and published not in (None, len(all_words)):
        found.append(f"its vocabulary has {len(all_words):,} words, and that of {corpus} has {published:,}")
    return tuple(f"{caveat}: perplexities are not comparable with published ones" for caveat in found)


def _is_prepared(folder: Path) -> bool:
    return (folder / _SUMMARY).is_file()


def _read_split(folder: Path, name: str, counts: SplitCounts) -> EncodedSplit:
    tokens = read_tokens(folder / f"{name}.npy", counts.num_tokens + 1)
    documents = read_documents(
        folder / f"{name}_documents.npy",
        counts.documents_fingerprint,
        num_tokens=counts.num_tokens,
        num_words=counts.num_words,
        num_bytes=counts.num_bytes,
    )
    return EncodedSplit(tokens, counts.num_words, counts.num_bytes, counts.num_unknown, documents)


def _cache_name(config: DataConfig, corpus: Corpus) -> str:
    """A folder name that changes with the text, the tokenizer and its settings."""
    kind, digest = config.tokenizer, ""
    if kind not in TOKENIZER_KINDS:
        load_tokenizer(kind)  # complains if there is none
        kind, digest = "other", file_digest(Path(config.tokenizer, "tokenizer.json"))
    key = repr((_FORMAT, corpus.name, corpus.fingerprint, kind, digest, config.vocab_size))
    return f"{corpus.name}-{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def _write(config: DataConfig, corpus: Corpus, folder: Path) -> None:
    """Make the prepared folder beside its place, and rename it."""
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        aside.mkdir(parents=True)
        _fill(config, corpus, aside)
        os.replace(aside, folder)  # fails where a folder with something in it is
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror or error}). Give another place.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _fill(config: DataConfig, corpus: Corpus, folder: Path) -> None:
    if config.tokenizer in TOKENIZER_KINDS:
        logger.info("training a %s tokenizer on %s", config.tokenizer, corpus.name)
        tokenizer = train_tokenizer(config.tokenizer, corpus, config.vocab_size)
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    save_tokenizer(tokenizer, folder / "tokenizer")
    splits, digests = {}, []
    for name in SPLITS:
        documents = corpus.splits[name].documents
        with TokenWriter(folder / f"{name}.npy", vocab_size=len(tokenizer)) as writer:
            counts, found = encode_split(documents, tokenizer, writer, lines_count_as_words=corpus.lines_count_as_words)
        write_documents(folder / f"{name}_documents.npy", found)
        splits[name] = asdict(counts)
        digests.append(writer.digest)
        logger.info("encoded %s: %d tokens", name, counts.num_tokens)
    summary = {
        "format": _FORMAT,
        "fingerprint": _fingerprint(tokenizer, digests),
        "corpus": config.corpus,
        "tokenizer": config.tokenizer,
        "vocab_size": config.vocab_size,
        "splits": splits,
    }
    (folder / _SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _fingerprint(tokenizer: PreTrainedTokenizerFast, digests: Iterable[bytes]) -> str:
    """sha256 of the vocabulary and, by their own, of the tokens of each split."""
    fingerprint = vocabulary_hash(tokenizer)
    for digest in digests:
        fingerprint.update(digest)
    return fingerprint.hexdigest()
