"""Whatever stands in text, token or tokenizer files, the answer is a corpus or one line that names the file."""

import io
import json
import lzma
import shutil

import numpy as np
import pytest
from fuzzing import fuzz, sizes
from hypothesis import strategies as st
from tiny_run import recipe_mapping, write_corpus

from deq_lm.data import text_files
from deq_lm.data.encoding import DataConfig, load_prepared, prepare
from deq_lm.data.text_files import read_lines
from deq_lm.errors import ConfigError, DataError


def config_of(folder, cache) -> DataConfig:
    return DataConfig(corpus="text", data_dir=str(folder), tokenizer="bpe", vocab_size=300, cache_dir=str(cache))


def copy_of(folder, place):
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place)
    return place


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    data = recipe_mapping(folder)["data"]
    prepare(DataConfig(**data))
    (made,) = (folder / "cache").iterdir()
    return made


@sizes
def test_any_bytes_as_lines_are_text_or_refused_with_the_file_and_offset(tmp_path, num_inputs):
    path = tmp_path / "train.txt"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        problem = None
        try:
            lines = list(read_lines(path))
        except DataError as error:
            problem = str(error)
        if problem is None:
            text = content.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
            assert "".join(lines) == text
        else:
            assert str(path) in problem
            assert b"\0" in content or not is_utf8(content)

    fuzz(check, st.binary(max_size=200) | st.text(max_size=80).map(str.encode), num_inputs)


def is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


@sizes
def test_any_bytes_in_a_split_make_a_corpus_or_leave_nothing_behind(tmp_path, num_inputs):
    folder, cache = write_corpus(tmp_path / "text"), tmp_path / "cache"

    def check(drawn) -> None:
        split, content, is_xz = drawn
        place = copy_of(folder, tmp_path / "fuzzed")
        if is_xz:
            (place / f"{split}.txt").unlink()
            (place / f"{split}.txt.xz").write_bytes(content)
        else:
            (place / f"{split}.txt").write_bytes(content)
        shutil.rmtree(cache, ignore_errors=True)
        try:
            prepare(config_of(place, cache))
        except (DataError, ConfigError) as error:
            problem = str(error)
            assert "\n" not in problem or split in problem
            assert not cache.exists() or list(cache.iterdir()) == []

    content = (
        st.binary(max_size=100) | st.text(max_size=100).map(str.encode) | st.binary(max_size=60).map(lzma.compress)
    )
    drawn = st.tuples(st.sampled_from(["train", "valid", "test"]), content, st.booleans())
    fuzz(check, drawn, min(num_inputs, 400))


def test_a_line_that_never_ends_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "train.txt.xz"
    with lzma.open(path, "wb") as file:
        for _ in range(64):
            file.write(b"a" * (1 << 20))
    assert path.stat().st_size < 20_000  # 64 MB
    with pytest.raises(DataError, match=r"train.txt.xz: the line at byte 0 is longer than 1,048,576 bytes"):
        list(read_lines(path))
    (tmp_path / "fine.txt").write_text("b" * (1 << 20) + "\n" + "c" * 5, encoding="utf-8")
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", (1 << 20) + 1)
    assert [len(line) for line in read_lines(tmp_path / "fine.txt")] == [(1 << 20) + 1, 5]


def test_a_link_out_of_the_data_folder_is_refused_and_one_within_is_not(tmp_path):
    folder = write_corpus(tmp_path / "text")
    secret = tmp_path / "secret.txt"
    secret.write_text("not yours\n", encoding="utf-8")
    (folder / "valid.txt").rename(folder / "other.txt")
    (folder / "valid.txt").symlink_to(folder / "other.txt")
    prepare(config_of(folder, tmp_path / "cache"))
    (folder / "valid.txt").unlink()
    (folder / "valid.txt").symlink_to(secret)
    with pytest.raises(DataError, match=r"valid.txt: is a link to .*secret.txt, outside the folder"):
        prepare(config_of(folder, tmp_path / "cache"))


@sizes
def test_any_bytes_in_a_prepared_file_are_refused_or_change_nothing_of_its_shape(prepared, tmp_path, num_inputs):
    files = [
        "train.npy",
        "train_documents.npy",
        "prepared.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ]
    assert all((prepared / name).is_file() for name in files)

    def check(drawn) -> None:
        name, content = drawn
        place = copy_of(prepared, tmp_path / "fuzzed")
        (place / name).write_bytes(content)
        try:
            corpus = load_prepared(place)
        except DataError as error:
            assert "fuzzed" in str(error)  # noqa: PT017
        else:
            assert corpus.splits["train"].tokens.max() < len(corpus.tokenizer)

    fuzz(check, st.tuples(st.sampled_from(files), st.binary(max_size=150)), min(num_inputs, 400))


@sizes
def test_counts_of_a_prepared_folder_that_cannot_be_are_refused(prepared, tmp_path, num_inputs):
    summary = json.loads((prepared / "prepared.json").read_text("utf-8"))
    values = (
        st.none()
        | st.integers(-(2**70), 2**70)
        | st.floats()
        | st.text(max_size=5)
        | st.lists(st.integers(), max_size=2)
    )

    def check(drawn) -> None:
        key, value = drawn
        changed = json.loads(json.dumps(summary))
        if key in changed:
            changed[key] = value
        else:
            changed["splits"]["train"][key] = value
        place = copy_of(prepared, tmp_path / "fuzzed")
        (place / "prepared.json").write_text(json.dumps(changed), encoding="utf-8")
        try:
            load_prepared(place)
        except DataError as error:
            assert "fuzzed" in str(error)  # noqa: PT017

    keys = st.sampled_from([*summary, *summary["splits"]["train"]])
    fuzz(check, st.tuples(keys, values), min(num_inputs, 400))


def test_a_token_beyond_the_vocabulary_and_pickled_tokens_are_refused(prepared, tmp_path):
    place = copy_of(prepared, tmp_path / "fuzzed")
    tokens = np.load(place / "train.npy").copy()
    tokens[5] = 60_000
    np.save(place / "train.npy", tokens)
    with pytest.raises(DataError, match=r"train.npy has the token 60000, of a vocabulary of 300"):
        load_prepared(place)
    buffer = io.BytesIO()
    np.save(buffer, np.array([print] * len(tokens), dtype=object), allow_pickle=True)
    (place / "train.npy").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="damaged"):
        load_prepared(place)
