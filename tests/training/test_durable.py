"""Files and folders that are there completely or not at all."""

import os

import pytest

from deq_lm.training.durable import begin_folder, publish_folder, remove_folder, write_text


def crash(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_file_keeps_its_old_text_until_the_new_one_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            write_text(path, "new")
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_appears_under_its_name_only_when_published(tmp_path):
    path = tmp_path / "parent" / "step"
    aside = begin_folder(path)
    (aside / "part").write_text("1")
    assert not path.exists()
    publish_folder(aside, path)
    assert (path / "part").read_text() == "1"
    assert not aside.exists()


def test_publishing_replaces_a_folder_of_the_same_name(tmp_path):
    for content in ("1", "2"):
        aside = begin_folder(tmp_path / "step")
        (aside / "part").write_text(content)
        publish_folder(aside, tmp_path / "step")
    assert (tmp_path / "step" / "part").read_text() == "2"
    assert [entry.name for entry in tmp_path.iterdir()] == ["step"]


def test_what_a_killed_save_left_aside_is_not_taken_over(tmp_path):
    (begin_folder(tmp_path / "step") / "torn").write_text("half")
    assert list(begin_folder(tmp_path / "step").iterdir()) == []


def test_a_removal_that_is_killed_leaves_no_half_of_a_folder_under_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "step"
    folder.mkdir()
    (folder / "part").write_text("1")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", crash)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(folder)
    assert not folder.exists()
    remove_folder(folder)  # nothing there: nothing to do
