"""Tokens on disk: lossless, counted, made once, never half-written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from deq_lm.data.encoding import DataConfig, load_prepared, prepare, prepare_into
from deq_lm.data.text_files import SPLITS
from deq_lm.errors import ConfigError, DataError

DATA = Path(os.environ.get("DEQ_LM_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
ROOT = Path(__file__).resolve().parents[2]
TEXT = "= One =\n\nThe cat  sat;\tthe <unk> dog @-@ like.\n\n= Two =\n\nDéjà vu — 日本 <|endoftext|>\n" * 20


@pytest.fixture
def folder(tmp_path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    for split in SPLITS:
        (source / f"{split}.txt").write_text(TEXT, encoding="utf-8")
        (source / f"wiki.{split}.tokens").write_text(TEXT.replace("<|endoftext|>", ""), encoding="utf-8")
    return source


@pytest.mark.parametrize(("kind", "vocab_size"), [("bpe", 320), ("sentencepiece", 294)])
def test_subwords_are_lossless_and_every_document_ends_with_one_eos(folder: Path, tmp_path, kind: str, vocab_size: int):
    encoded = prepare_into(DataConfig("text", kind, vocab_size, str(folder)), tmp_path / "out")
    split, eos = encoded.splits["valid"], encoded.tokenizer.eos_token_id
    tokens = split.tokens.tolist()
    assert tokens[0] == eos
    assert tokens.count(eos) == 1 + 21  # the context, and one after each document
    assert encoded.tokenizer.decode([token for token in tokens if token != eos]) == TEXT
    assert split.num_bytes == len(TEXT.encode())
    assert split.num_words == len(TEXT.split())


def test_words_are_split_at_white_space_only_and_every_line_ends_with_eos(folder: Path, tmp_path):
    encoded = prepare_into(DataConfig("wikitext-2", "word_level", None, str(folder)), tmp_path / "out")
    split = encoded.splits["test"]
    text = TEXT.replace("<|endoftext|>", "")
    expected = " ".join(f"{line} <eos>" for line in text.split("\n")[:-1]).split()
    assert [encoded.tokenizer.convert_ids_to_tokens(int(token)) for token in split.tokens[1:]] == expected
    assert split.num_tokens == split.num_words == len(expected)


@pytest.mark.parametrize(("kind", "corpus"), [("bpe", "text"), ("word_level", "wikitext-2")])
def test_every_document_has_its_own_counts_however_long_it_is(folder, tmp_path, monkeypatch, kind, corpus):
    monkeypatch.setattr("deq_lm.data.split_encoding._BATCH_CHARACTERS", 10)  # so that a document comes in pieces
    text = "= A =\n\n" + "one two\nthree\n" * 5 + "\n= B =\n\nfour\n\n= C =\n\nfive six"
    for name in ("test.txt", "wiki.test.tokens"):
        (folder / name).write_text(text, encoding="utf-8")
    encoded = prepare_into(DataConfig(corpus, kind, 320 if kind == "bpe" else None, str(folder)), tmp_path / "out")
    split = encoded.splits["test"]
    documents, texts = split.documents, [text[:78], text[78:91], text[91:]]
    assert [part.split("\n")[0] for part in texts] == ["= A =", "= B =", "= C ="]
    assert documents.num_bytes.tolist() == [len(part) for part in texts]
    lines = [part.count("\n") + (not part.endswith("\n")) for part in texts] if corpus != "text" else [0, 0, 0]
    assert documents.num_words.tolist() == [len(part.split()) + count for part, count in zip(texts, lines, strict=True)]
    assert documents.ends[-1] == split.num_tokens
    for part, end, length in zip(texts, documents.ends, documents.num_tokens, strict=True):
        tokens = split.tokens[1:][end - length : end].tolist()
        assert tokens[-1] == encoded.tokenizer.eos_token_id
        if kind == "bpe":
            assert encoded.tokenizer.decode(tokens[:-1]) == part
        else:
            assert len(tokens) == len(part.split()) + part.count("\n") + (not part.endswith("\n"))


def test_the_fingerprint_of_documents_is_that_of_their_texts_alone(folder: Path, tmp_path):
    def fingerprint(*settings) -> str:
        made = prepare_into(DataConfig("text", *settings, str(folder)), tmp_path / str(len(list(tmp_path.iterdir()))))
        return made.splits["test"].documents.fingerprint

    first = fingerprint("bpe", 320)
    assert fingerprint("word_level", None) == first
    (folder / "test.txt").write_text(TEXT.replace("cat", "dog", 1), encoding="utf-8")
    assert fingerprint("bpe", 320) != first


def test_counts_of_documents_that_do_not_add_up_are_refused(folder: Path, tmp_path):
    out = tmp_path / "out"
    prepare_into(DataConfig("text", "bpe", 300, str(folder)), out)
    counts = np.load(out / "test_documents.npy")
    for changed in (counts[:-1], counts + np.eye(*counts.shape, dtype=np.int64), counts.astype(float), counts[:, 0]):
        np.save(out / "test_documents.npy", changed)
        with pytest.raises(DataError, match=r"damaged.*test_documents.npy"):
            load_prepared(out)


def test_the_cache_is_used_again_and_not_for_another_text(folder: Path, tmp_path):
    config = DataConfig("text", "bpe", 300, str(folder), str(tmp_path / "cache"))
    first = prepare(config)
    (made,) = (tmp_path / "cache").iterdir()
    stamp = (made / "train.npy").stat().st_mtime_ns
    assert prepare(config).fingerprint == first.fingerprint
    assert (made / "train.npy").stat().st_mtime_ns == stamp
    (folder / "train.txt").write_text("Another text. " * 50)
    assert prepare(config).fingerprint != first.fingerprint
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_failure_leaves_nothing_behind(folder: Path, tmp_path):
    (folder / "test.txt").write_bytes(b"good\n\xff\n")
    for split in ("out", "cache"):
        with pytest.raises(DataError, match=r"test.txt"):
            prepare_into(DataConfig("text", "bpe", 300, str(folder)), tmp_path / split)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_disk_that_is_full_when_the_tokenizer_is_written_is_one_error(folder: Path, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    with pytest.raises(DataError, match=r"out: cannot be written \(tokenizer.json: No space left"):
        prepare_into(DataConfig("text", "bpe", 320, str(folder)), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_damaged_prepared_folder_is_refused(folder: Path, tmp_path):
    out = tmp_path / "out"
    prepare_into(DataConfig("text", "bpe", 300, str(folder)), out)
    np.save(out / "valid.npy", np.zeros(3, dtype=np.uint16))
    with pytest.raises(DataError, match="damaged"):
        prepare(DataConfig("prepared", "bpe", data_dir=str(out)))


def test_one_other_token_or_word_in_a_prepared_folder_is_noticed(folder: Path, tmp_path):
    out = tmp_path / "out"
    prepare_into(DataConfig("text", "bpe", 300, str(folder)), out)
    content = (out / "train.npy").read_bytes()
    (out / "train.npy").write_bytes(content[:-2] + bytes([content[-2] ^ 1, content[-1]]))
    with pytest.raises(DataError, match="damaged \\(vocabulary or tokens have the SHA-256"):
        load_prepared(out)
    (out / "train.npy").write_bytes(content)
    load_prepared(out)
    words = tmp_path / "words"
    prepare_into(DataConfig("text", "word_level", None, str(folder)), words)
    tokenizer = words / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text("utf-8").replace('"the":', '"teh":', 1), encoding="utf-8")
    with pytest.raises(DataError, match="damaged \\(vocabulary or tokens have the SHA-256"):
        load_prepared(words)


def test_prepared_words_fit_a_recipe_that_says_how_many_they_are(folder: Path, tmp_path):
    out = tmp_path / "out"
    size = len(prepare_into(DataConfig("text", "word_level", None, str(folder)), out).tokenizer)
    for vocab_size in (None, size):
        assert len(prepare(DataConfig("prepared", "word_level", vocab_size, str(out))).tokenizer) == size
    with pytest.raises(DataError, match=rf"vocab_size None \({size} entries\), not word_level and {size - 1}"):
        prepare(DataConfig("prepared", "word_level", size - 1, str(out)))


def test_a_full_folder_is_not_written_into(folder: Path, tmp_path):
    with pytest.raises(DataError, match="is there already"):
        prepare_into(DataConfig("text", "bpe", 300, str(folder)), folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wikipedia", "bpe", 300), "not known"),
        (("text", "bpe"), "no vocab_size"),
        (("prepared", "bpe"), "no data_dir"),
        (("builtin", "somewhere", 300), "has its vocabulary already"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(arguments: tuple, message: str):
    with pytest.raises(ConfigError, match=message):
        DataConfig(*arguments)


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not (DATA / "wikitext-103").is_dir(), reason=f"no WikiText-103 in {DATA}")
def test_prepare_data_prints_the_published_counts_of_wikitext_103(tmp_path):
    for split in SPLITS:  # the training split stands in for itself in name only
        shutil.copy(
            DATA / "wikitext-103" / f"{'valid' if split == 'train' else split}.tokens",
            tmp_path / f"wiki.{split}.tokens",
        )
    done = call(
        *("--corpus", "wikitext-103", "--data-dir", str(tmp_path), "--tokenizer", "word_level"),
        *("--output", str(tmp_path / "out")),
    )
    assert done.returncode == 0, done.stderr
    counts = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()}
    assert counts["valid"] == "217,646"
    assert counts["test"] == "245,569"


def test_prepare_data_fails_in_one_line(tmp_path):
    done = call(
        "--corpus", "text", "--data-dir", str(tmp_path), "--tokenizer", "bpe", "--output", str(tmp_path / "out")
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert call("--help").returncode == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"corpus": "wikitext103", "tokenizer": "bpe", "vocab_size": 300}, "did you mean wikitext-103"),
        ({"corpus": "text", "tokenizer": "wordlevel"}, "did you mean word_level"),
    ],
)
def test_a_misspelt_corpus_or_tokenizer_gets_a_suggestion(folder: Path, tmp_path, config: dict, message: str):
    with pytest.raises((ConfigError, DataError), match=message):
        prepare(DataConfig(**config, data_dir=str(folder), cache_dir=str(tmp_path / "cache")))


def test_a_tokenizer_is_saved_with_what_generation_needs(folder, tmp_path):
    tokenizer = prepare(DataConfig("text", "bpe", 300, str(folder), str(tmp_path / "cache"))).tokenizer
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (loaded.padding_side, loaded.bos_token, loaded.pad_token) == ("left", "<|endoftext|>", "<|endoftext|>")


def test_a_tokenizer_whose_package_is_not_installed_is_an_error_that_says_so(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(DataError, match="pip install sentencepiece"):
        prepare_into(DataConfig("text", "sentencepiece", 294, str(folder)), folder / "out")
