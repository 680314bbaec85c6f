"""Word-level WikiText: vocabulary and tokens as Transformer-XL has them, from files and from the hub alike."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from deq_lm.data import corpora
from deq_lm.data.corpora import load_corpus
from deq_lm.data.encoding import DataConfig, EncodedCorpus, prepare_into
from deq_lm.data.text_files import SPLITS
from deq_lm.data.tokenizers import word_level
from deq_lm.errors import DataError

DATA = Path(os.environ.get("DEQ_LM_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")) / "wikitext-103"
TRICKY = (
    " \n = Tide = \n \n The tide , the <unk> @-@ moon @,@ 1 @.@ 5 \u00a0 seas\u3000seas \t the . \n"
    "no space at the ends\n = = Section = = \n \n the the a b b a <unk> <unk> caf\u00e9 cafe\u0301 \u2019s \x1c x \n"
)


def reference(splits: dict[str, str]) -> tuple[list[str], dict[str, list[str]]]:
    """The vocabulary and the words of each split, as the code of Dai et al. 2019 makes them."""
    counts: Counter[str] = Counter()
    for line in splits["train"].split("\n")[:-1]:
        counts.update(line.strip().split())
    vocabulary = ["<eos>", *(word for word, _ in counts.most_common())]
    known = set(vocabulary)
    words = {}
    for name, text in splits.items():
        lines = ([*line.strip().split(), "<eos>"] for line in text.split("\n")[:-1])
        words[name] = [word if word in known else "<unk>" for line in lines for word in line]
    return vocabulary, words


def write(folder: Path, splits: dict[str, str]) -> Path:
    folder.mkdir()
    for name, text in splits.items():
        (folder / f"wiki.{name}.tokens").write_text(text, encoding="utf-8")
    return folder


def spelled(encoded: EncodedCorpus, split: str) -> list[str]:
    return encoded.tokenizer.convert_ids_to_tokens(encoded.splits[split].tokens[1:].tolist())


def check(splits: dict[str, str], folder: Path) -> EncodedCorpus:
    config = DataConfig("wikitext-103", "word_level", data_dir=str(write(folder / "text", splits)))
    encoded = prepare_into(config, folder / "out")
    vocabulary, words = reference(splits)
    assert encoded.tokenizer.convert_ids_to_tokens(list(range(len(encoded.tokenizer)))) == vocabulary
    for name in SPLITS:
        assert spelled(encoded, name) == words[name]
        assert encoded.splits[name].num_words == encoded.splits[name].num_tokens == len(words[name])
        assert encoded.splits[name].num_unknown == words[name].count("<unk>")
    return encoded


def test_vocabulary_and_tokens_are_the_references(tmp_path: Path):
    check({"train": TRICKY, "valid": TRICKY + "unheard of \n", "test": "the\n"}, tmp_path)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no WikiText-103 in {DATA}; DEQ_LM_DATA is its parent")
def test_vocabulary_and_tokens_of_real_text_are_the_references_and_as_many_as_published(tmp_path: Path):
    real = {name: (DATA / f"{name}.tokens").read_text("utf-8") for name in ("valid", "test")}
    encoded = check({"train": real["valid"], **real}, tmp_path)
    assert (encoded.splits["valid"].num_words, encoded.splits["test"].num_words) == (217_646, 245_569)


def test_another_text_under_the_name_of_a_published_one_is_pointed_out(tmp_path: Path, caplog, monkeypatch):
    splits = dict.fromkeys(SPLITS, TRICKY)
    folder = write(tmp_path / "text", splits)
    with caplog.at_level(logging.WARNING):
        encoded = prepare_into(DataConfig("wikitext-103", "word_level", data_dir=str(folder)), tmp_path / "a")
    count = encoded.splits["train"].num_words
    assert f"the train split has {count} words, and that of wikitext-103 has 103,227,021" in caplog.text
    assert f"its vocabulary has {len(encoded.tokenizer)} words, and that of wikitext-103 has 267,735" in caplog.text
    assert len(caplog.records) == len(encoded.caveats) == 4
    caplog.clear()
    monkeypatch.setitem(corpora.PUBLISHED_WORDS, "wikitext-103", dict.fromkeys(SPLITS, count))
    monkeypatch.setitem(corpora.PUBLISHED_VOCABULARY, "wikitext-103", len(encoded.tokenizer))
    prepare_into(DataConfig("wikitext-103", "word_level", data_dir=str(folder)), tmp_path / "b")
    prepare_into(DataConfig("text", "word_level", data_dir=str(as_text(tmp_path / "t"))), tmp_path / "c")
    assert not caplog.records


def as_text(folder: Path) -> Path:
    folder.mkdir()
    for name in SPLITS:
        (folder / f"{name}.txt").write_text(TRICKY, encoding="utf-8")
    return folder


def hub_rows(text: str) -> Dataset:
    """The hub's form of a file: a row a line, with its newline, and "" for the blank ones."""
    lines = text.split("\n")[:-1]
    return Dataset.from_dict({"text": ["" if line == " " else f"{line}\n" for line in lines]})


def test_the_hub_gives_the_same_as_the_files(tmp_path: Path, monkeypatch):
    splits = {"train": TRICKY, "valid": " \n = A = \n \n word \n", "test": " = B = \n \n other word \n \n"}
    asked = []

    def load_dataset(*arguments, **options) -> DatasetDict:
        asked.append((arguments, options))
        names = {"train": "train", "valid": "validation", "test": "test"}
        return DatasetDict({names[name]: hub_rows(text) for name, text in splits.items()})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr(corpora, "_hub_answers", lambda: True)
    monkeypatch.setattr(corpora, "KNOWN_SHA256", {})
    hub = load_corpus("wikitext-103")
    assert asked == [(("Salesforce/wikitext", "wikitext-103-v1"), {"revision": corpora.HUB_REVISION})]
    files = load_corpus("wikitext-103", data_dir=write(tmp_path / "text", splits))
    for name in SPLITS:
        assert list(hub.splits[name].documents) == list(files.splits[name].documents)
        assert list(hub.splits[name].documents)  # and can be read again
    encoded = [
        prepare_into(DataConfig("wikitext-103", "word_level", data_dir=folder), tmp_path / place)
        for folder, place in ((None, "hub"), (str(tmp_path / "text"), "files"))
    ]
    assert encoded[0].fingerprint == encoded[1].fingerprint


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no WikiText-103 in {DATA}; DEQ_LM_DATA is its parent")
def test_text_of_the_hub_is_the_original_to_the_byte_or_refused(monkeypatch):
    valid, test = ((DATA / f"{name}.tokens").read_text("utf-8") for name in ("valid", "test"))
    rows = DatasetDict(
        {"train": hub_rows(TRICKY), "validation": hub_rows(valid), "test": hub_rows(test + "one more \n")}
    )
    monkeypatch.setattr("datasets.load_dataset", lambda *_arguments, **_options: rows)
    monkeypatch.setattr(corpora, "_hub_answers", lambda: True)
    splits = load_corpus("wikitext-103").splits
    assert "".join(splits["valid"].documents) == valid
    assert "".join(splits["train"].documents) == TRICKY  # of which no hash is known
    with pytest.raises(
        DataError, match=r"the test split of wikitext-103: what the hub gave has the SHA-256 [0-9a-f]{64}"
    ):
        list(splits["test"].documents)


def test_what_the_hub_refuses_is_one_error(monkeypatch):
    def load_dataset(*_arguments, **_options):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr(corpora, "_hub_answers", lambda: True)
    with pytest.raises(DataError, match=r"the hub gave no Salesforce/wikitext .*no route.*Give data_dir"):
        load_corpus("wikitext-103")


@pytest.mark.parametrize(("tokenizer", "vocab_size"), [("word_level", None), ("bpe", 300), ("sentencepiece", 270)])
def test_a_line_of_ten_megabytes_is_encoded_like_any_other(tmp_path: Path, tokenizer: str, vocab_size: int | None):
    line, num_words = "the tide is in ", 2_800_000
    folder = tmp_path / "text"
    folder.mkdir()
    for name, text in {"train": "the tide is in and out\n" * 50, "valid": line * 2 + "\n"}.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    (folder / "test.txt").write_text(line * (num_words // 4) + "\n", encoding="utf-8")
    encoded = prepare_into(DataConfig("text", tokenizer, vocab_size, str(folder)), tmp_path / "out")
    long, short = encoded.splits["test"], encoded.splits["valid"]
    assert long.num_words == num_words
    assert long.num_bytes == len(line) * num_words // 4 + 1 > 10e6
    period = (short.num_tokens - 1) // 2  # all but the end, of two repetitions
    assert (long.tokens[1 : period + 1] == short.tokens[1 : period + 1]).all()
    assert abs(long.num_tokens - period * num_words // 4) <= 4


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path):
    script = """
import resource, sys
from pathlib import Path
from deq_lm.data.split_encoding import encode_split
from deq_lm.data.token_file import TokenWriter
from deq_lm.data.tokenizers import bpe
text = "the tide is in and the moon is out , said the sea\\n" * 200
tokenizer = bpe.train([text], 300)
def encode(num):
    with TokenWriter(Path(sys.argv[1]), vocab_size=300) as writer:
        encode_split((text for _ in range(num)), tokenizer, writer, lines_count_as_words=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small, large = encode(300), encode(1500)  # 3 and 15 MB
print(large - small)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "tokens.npy")], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 40  # MB


def test_the_words_of_a_long_document_are_never_all_there_at_once():
    document = "the tide is in and out\n" * 100_000
    tracemalloc.start()
    try:
        word_level.train([document], None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * len(document)  # the lines; all its words at once would be 15 more


@pytest.mark.parametrize("content", ["a b\r\n\r\nc\r\n", "a b\n\nc"])
def test_line_ends_of_other_systems_and_a_missing_last_one_change_no_word(tmp_path: Path, content: str):
    folder = tmp_path / "text"
    folder.mkdir()
    for name in SPLITS:
        (folder / f"wiki.{name}.tokens").write_bytes(content.encode())
    encoded = prepare_into(DataConfig("wikitext-2", "word_level", data_dir=str(folder)), tmp_path / "out")
    assert spelled(encoded, "test") == ["a", "b", "<eos>", "<eos>", "c", "<eos>"]
