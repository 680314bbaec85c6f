"""Text in, documents out: exactly, or an error that names the file and the place."""

import lzma
import os
import re
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


NO_TEXT, NOT_UTF8, NUL = "the valid split has no text", r"byte \d+ is not UTF-8", r"NUL at byte \d+"
TORTURE: dict[str, tuple[bytes, int | str]] = {
    "empty": (b"", NO_TEXT),
    "only newlines": (b"\n\n\n", NO_TEXT),
    "only white space": (" \n\t\r\n\u00a0\u3000\n".encode(), NO_TEXT),
    "only a byte order mark": (b"\xef\xbb\xbf", NO_TEXT),
    "a byte order mark": (b"\xef\xbb\xbfone two\n", 2),
    "a byte order mark inside": ("one \ufefftwo\n".encode(), 2),
    "no newline at the end": (b"one two", 2),
    "newlines of Windows": (b"one\r\ntwo\r\n", 2),
    "newlines of old Macs": (b"one\rtwo\r", 2),
    "U+0085": ("one\x85two\n".encode(), 2),
    "U+2028": ("one\u2028two\n".encode(), 2),
    "a no-break space": ("one\u00a0two\n".encode(), 2),
    "an ideographic space": ("one\u3000two\n".encode(), 2),
    "a zero-width space": ("one\u200btwo\n".encode(), 1),
    "form feeds and vertical tabs": (b"one\x0ctwo\x0bthree\n", 3),
    "escapes of a terminal": (b"\x1b[31mone\x1b[0m two\n", 2),
    "a combining accent": ("cafe\u0301 caf\u00e9\n".encode(), 2),
    "beyond the basic plane": ("\U0001f600 \U0010ffff\n".encode(), 2),
    "a line of a million words": (b"word " * 1_000_000, 1_000_000),
    "NUL": (b"one\0two\n", NUL),
    "only NUL": (b"\0" * 9, NUL),
    "a byte that is not UTF-8": (b"one\xfftwo\n", "byte 3 is not UTF-8"),
    "a character cut off at the end": ("one\u3000".encode()[:-1], "byte 3 is not UTF-8"),
    "an overlong slash": (b"one \xc0\xaf\n", "byte 4 is not UTF-8"),
    "half a surrogate pair": (b"one \xed\xa0\x80\n", "byte 4 is not UTF-8"),
    "Latin-1": ("one caf\u00e9\n".encode("latin-1"), "byte 7 is not UTF-8"),
    "UTF-16": ("one two\n".encode("utf-16"), NUL),
    "UTF-16 without a mark": ("one two\n".encode("utf-16-le"), NUL),
    "UTF-32": ("one two\n".encode("utf-32"), f"{NUL}|{NOT_UTF8}"),
    "a compressed file": (b"\x1f\x8b\x08\x00\x00", f"{NUL}|{NOT_UTF8}"),
    "a picture": (b"\x89PNG\r\n\x1a\n\x00", f"{NUL}|{NOT_UTF8}"),
}


@pytest.mark.parametrize("name", TORTURE)
@pytest.mark.parametrize("ending", ["txt", "txt.xz"])
def test_whatever_a_file_holds_is_so_many_words_or_refused_with_its_name(tmp_path, name: str, ending: str):
    content, expected = TORTURE[name]
    (folder_of(tmp_path) / "valid.txt").unlink()
    (tmp_path / f"valid.{ending}").write_bytes(lzma.compress(content) if ending == "txt.xz" else content)
    problem = num_words = None
    try:
        documents = load_corpus("text", data_dir=tmp_path).splits["valid"].documents
        num_words = sum(len(text.split()) for text in documents)
    except DataError as error:
        problem = str(error)
    if isinstance(expected, int):
        assert problem is None
        assert num_words == expected
    else:
        assert num_words is None
        assert re.search(rf"valid\.{ending}: .*({expected})", problem)
        assert "\n" not in problem


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
