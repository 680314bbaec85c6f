"""Table: a title and rows of text, and how a number becomes text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Row = Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """A title and rows of one set of columns."""

    title: str
    rows: Sequence[Row]


def number(value: float | None, form: str) -> str:
    """The value by a format; a dash for None."""
    return "-" if value is None else format(value, form)


def within(half_width: float | None) -> str:
    """What follows a mean that has an interval; nothing for None."""
    return "" if half_width is None else f" +- {half_width:.3f}"


def in_units(value: float | None, unit: float) -> str:
    """The value in so many units, with one decimal; a dash for None."""
    return "-" if value is None else f"{value / unit:,.1f}"


def ratio(value: float | None, base: float | None, unit: float, name: str) -> str:
    """The value in units of this name, and in brackets its ratio to another; a dash for None."""
    if value is None:
        return "-"
    times = f" ({value / base:.2f}x)" if base else ""
    return f"{value / unit:,.1f} {name}{times}"
