"""Text in, documents out: exactly, or an error that names the file and the place."""

import lzma
import os
from pathlib import Path

import pytest

from deq_lm.data.corpora import load_corpus
from deq_lm.data.text_files import SPLITS, documents, read_lines
from deq_lm.errors import ConfigError, DataError, UnusedSettingWarning

DATA = Path(os.environ.get("DEQ_LM_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def folder_of(path: Path, text: str = "Some words.\n") -> Path:
    for split in SPLITS:
        (path / f"{split}.txt").write_text(text, encoding="utf-8")
    return path


def test_the_builtin_corpus_is_prose_in_three_disjoint_splits_and_always_the_same():
    corpus = load_corpus("builtin")
    texts = {split: list(corpus.splits[split].documents) for split in SPLITS}
    again = load_corpus("builtin")
    assert corpus.fingerprint == again.fingerprint
    assert {split: list(again.splits[split].documents) for split in SPLITS} == texts
    assert not set(texts["train"]) & (set(texts["valid"]) | set(texts["test"]))
    words = {split: sum(len(text.split()) for text in texts[split]) for split in SPLITS}
    assert words["train"] > 150_000
    assert min(words["valid"], words["test"]) > 5_000
    assert "The " in texts["train"][0] or "the " in texts["train"][0]


def test_the_builtin_corpus_says_that_it_reads_no_folder(tmp_path):
    with pytest.warns(UnusedSettingWarning, match="takes no data_dir"):
        load_corpus("builtin", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"a\nb", ["a\n", "b"]),
        (b"a\r\nb\r\n", ["a\n", "b\n"]),
        (b"\xef\xbb\xbfa\n", ["a\n"]),
        ("a\u2028b\x85c\rd\n".encode(), ["a\u2028b\x85c\rd\n"]),
        (b"x" * 1_000_000, ["x" * 1_000_000]),
    ],
)
def test_a_line_ends_at_a_newline_and_nowhere_else(tmp_path, content: bytes, lines: list[str]):
    plain, packed = tmp_path / "t.txt", tmp_path / "t.txt.xz"
    plain.write_bytes(content)
    packed.write_bytes(lzma.compress(content))
    assert list(read_lines(plain)) == list(read_lines(packed)) == lines


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good\nb\xffd\n", "byte 6 is not UTF-8"),
        ("word\n".encode("utf-16"), "is not UTF-8|NUL at byte"),
        (b"a\0b\n", "NUL at byte 1"),
    ],
)
def test_what_is_not_utf8_text_is_refused_with_file_and_byte(tmp_path, content: bytes, message: str):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"bad.txt: .*{message}|bad.txt: {message}"):
        list(read_lines(path))


def test_a_title_after_a_blank_line_starts_a_document_and_nothing_is_lost():
    lines = [" \n", " = One = \n", "text\n", " = = Section = = \n", "\n", "= Two =\n", "more\n", "= no title =\n"]
    found = list(documents(lines))
    assert "".join(found) == "".join(lines)
    assert [text.split("=")[1].strip() for text in found] == ["One", "Two"]


def test_a_folder_of_text_gives_its_files_and_another_text_another_fingerprint(tmp_path):
    first = load_corpus("text", data_dir=folder_of(tmp_path))
    assert list(first.splits["valid"].documents) == ["Some words.\n"]
    (tmp_path / "valid.txt").write_text("Others.\n")
    assert load_corpus("text", data_dir=tmp_path).fingerprint != first.fingerprint


def test_one_file_is_cut_into_three_without_loss(tmp_path):
    path = tmp_path / "all.txt"
    path.write_text("".join(f"line {i} of the text\n" for i in range(200)))
    corpus = load_corpus("text", data_dir=path)
    texts = {split: "".join(corpus.splits[split].documents) for split in SPLITS}
    assert "".join(texts.values()) == path.read_text()
    assert len(texts["train"]) == pytest.approx(0.9 * path.stat().st_size, rel=0.02)


def test_an_empty_split_is_refused_by_name(tmp_path):
    folder_of(tmp_path)
    (tmp_path / "test.txt").write_text(" \n\n")
    with pytest.raises(DataError, match=r"test.txt: the test split has no text"):
        list(load_corpus("text", data_dir=tmp_path).splits["test"].documents)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("wikitext", {}, ConfigError, "not known. Choose one of"),
        ("text", {}, ConfigError, "no data_dir was given"),
        ("text", {"data_dir": "/nowhere"}, DataError, "/nowhere"),
        ("wikitext-103", {"data_dir": "/nowhere"}, DataError, "wiki.train.tokens or train.tokens, and there is none"),
    ],
)
def test_what_is_not_there_is_said(name: str, options: dict, error: type, message: str):
    with pytest.raises(error, match=message):
        load_corpus(name, **options)


def test_without_network_the_hub_corpora_say_what_to_do_instead(monkeypatch):
    monkeypatch.setattr("deq_lm.data.corpora._hub_answers", lambda: False)
    monkeypatch.setenv("HF_HUB_CACHE", "/nowhere")
    with pytest.raises(DataError, match=r"Give data_dir.*builtin"):
        load_corpus("wikitext-2")


@pytest.mark.skipif(not (DATA / "wikipedia-21m").is_dir(), reason=f"no Wikipedia text in {DATA}")
def test_packed_wikipedia_is_read_article_by_article():
    texts = list(load_corpus("text", data_dir=DATA / "wikipedia-21m").splits["valid"].documents)
    assert len(texts) == 71
    assert sum(len(text.split()) for text in texts) == 250_956
