"""Table: a title and rows of text, and how a number becomes text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """A title and rows of one set of columns."""

    title: str
    rows: Sequence[Row]


def number(value: Any, form: str, unit: float | None = None) -> str:
    """The value by a format, or in so many units with one decimal; a dash for None."""
    if value is None:
        return "-"
    return format(value / unit, ",.1f") if unit else format(value, form)
