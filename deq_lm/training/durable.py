"""Files and folders that are there completely or not at all, also after a crash: written aside, synced, renamed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, replacing what was there in one step."""
    aside = path.with_name(f".{path.name}.incomplete")
    with open(aside, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync(path.parent)


def begin_folder(path: Path) -> Path:
    """An empty folder beside `path`, to be filled and then handed to `publish_folder`."""
    aside = path.with_name(f".{path.name}.incomplete")
    remove_folder(aside)
    aside.mkdir(parents=True)
    return aside


def publish_folder(aside: Path, path: Path) -> None:
    """Sync all of `aside` and give it its name, in place of a folder that may be there already."""
    for inner in aside.rglob("*"):
        sync(inner)
    sync(aside)
    if path.exists():
        remove_folder(path)
    os.replace(aside, path)
    sync(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder, if there is one; it loses its name first, so that no half of it is ever taken for the whole."""
    if not path.exists():
        return
    doomed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def sync(path: Path) -> None:
    """Ask the operating system to put a file's bytes, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
