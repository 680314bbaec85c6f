"""write_report(): one self-contained HTML page, its Markdown twin, the plots and the tables as files."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
from matplotlib.figure import Figure

from deq_lm.errors import DataError
from deq_lm.reporting.measurements import Measurements
from deq_lm.reporting.published import Published
from deq_lm.reporting.sections import Plot, Section, sections_of
from deq_lm.reporting.table import Table
from deq_lm.training.durable import write_text

_INK = "#123456"
"""A color that plots use for text and lines alone; the page's own takes its place."""

_LONG = 50
"""Characters from which a cell is broken into lines."""

_PLAIN: dict[str, Any] = {
    "svg.hashsalt": "deq_lm",
    "svg.fonttype": "none",
    "font.size": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #6b6b70; --paper: #ffffff; --line: #d9d9de; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ea; --soft: #a0a0a8; --paper: #17181a; --line: #3a3b40; } }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding: 0.4rem 0; }
th, td { padding: 0.25rem 0.7rem 0.25rem 0; text-align: right; vertical-align: bottom;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; } td { white-space: nowrap; } td.prose { white-space: normal; text-align: left; min-width: 16rem; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
table { margin-top: 0.8rem; } figure { margin: 1.2rem 0; overflow-x: auto; }
figcaption, .soft { color: var(--soft); font-size: 0.9rem; }
svg { max-width: 100%; min-width: 30rem; height: auto; color: var(--ink); }
"""


def write_report(
    measurements: Measurements,
    published: Published | None,
    output: Path,
    *,
    title: str,
    notes: Mapping[str, str] | None = None,
) -> list[Section]:
    """Write index.html, report.md, tables.json and the plots as SVG into `output`; the same input gives the same bytes.

    Args:
        measurements: what to show.
        published: numbers to show beside them.
        output: a folder; made if it is not there.
        title: of the page.
        notes: what each model taught, by its name.

    Raises:
        DataError: results of one text were not measured alike, or `output` cannot be written.
    """
    with mpl.rc_context(cast(Any, _PLAIN)):
        return _write(sections_of(measurements, published, notes), output, title)


def write_markdown(
    measurements: Measurements, path: Path, *, title: str, notes: Mapping[str, str] | None = None
) -> None:
    """Write the Markdown twin alone, without plots, what is but words about plots, and the published numbers.

    Raises:
        DataError: as `write_report`.
    """
    sections = [section for section in sections_of(measurements, None, notes) if section.tables or not section.plots]
    try:
        write_text(path, to_markdown(title, [replace(section, plots=()) for section in sections]))
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}). Choose another --markdown.") from error


def write_figure(draw: Callable[[], Figure], path: Path) -> None:
    """Write one plot, drawn in the report's style, as SVG on white; the same input gives the same bytes.

    Raises:
        DataError: `path` cannot be written.
    """
    try:
        with mpl.rc_context(cast(Any, _PLAIN)):
            write_text(path, _svg(draw(), inline=False))
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}).") from error


def _write(sections: list[Section], output: Path, title: str) -> list[Section]:
    try:
        output.mkdir(parents=True, exist_ok=True)
        for plot in (plot for section in sections for plot in section.plots):
            write_text(output / f"{plot.name}.svg", _svg(plot.figure, inline=False))
        write_text(output / "index.html", to_html(title, sections))
        write_text(output / "report.md", to_markdown(title, sections))
        tables = {table.title: list(table.rows) for section in sections for table in section.tables}
        write_text(output / "tables.json", json.dumps({"tables": tables}, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error.strerror}). Choose another --output.") from error
    return sections


def to_html(title: str, sections: Sequence[Section]) -> str:
    """One page that needs nothing but itself: no script, no font, no image from elsewhere."""
    body = "\n".join(_html_section(section) for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n"
        f"{body}\n</body>\n</html>\n"
    )


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    """The same as Markdown; plots are the SVG files beside it."""
    parts = [f"# {title}"]
    for section in sections:
        parts += [f"## {section.title}", *section.text]
        for table in section.tables:
            parts += [f"*{table.title}*", markdown_rows(table)]
        parts += [f"![{plot.caption}]({plot.name}.svg)" for plot in section.plots]
    return "\n\n".join(parts) + "\n"


def markdown_rows(table: Table) -> str:
    """Header and rows of a table."""
    header = list(table.rows[0]) if table.rows else []
    lines = [header, ["---"] * len(header), *(list(row.values()) for row in table.rows)]
    return "\n".join("| " + " | ".join(cell.strip() for cell in line) + " |" for line in lines)


def _html_section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>", *(f"<p>{html.escape(text)}</p>" for text in section.text)]
    parts += [_html_table(table) for table in section.tables]
    parts += [_html_plot(plot) for plot in section.plots]
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _html_table(table: Table) -> str:
    header = "".join(f"<th>{html.escape(name.strip())}</th>" for name in (table.rows[0] if table.rows else {}))
    rows = "\n".join("<tr>" + "".join(map(_html_cell, row.values())) + "</tr>" for row in table.rows)
    return (
        f'<div class="scroll"><table><caption>{html.escape(table.title)}</caption>\n<thead><tr>{header}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _html_cell(cell: str) -> str:
    prose = ' class="prose"' if len(cell) > _LONG else ""
    return f"<td{prose}>{html.escape(cell)}</td>"


def _html_plot(plot: Plot) -> str:
    caption = html.escape(plot.caption)
    image = _svg(plot.figure, inline=True).replace("<svg ", f'<svg role="img" aria-label="{caption}" ', 1)
    image = re.sub(r'\b(id="|href="#|url\(#)', rf"\1{plot.name}-", image)  # ids are of the page, not of an image
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _svg(figure: Figure, *, inline: bool) -> str:
    """The figure as SVG: on white with ink of its own, or inline in the colors of the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=inline, metadata={"Date": None, "Creator": None})
    image = file.getvalue()
    image = image[image.index("<svg") :] if inline else image
    return image.replace(_INK, "currentColor" if inline else "#1c1c1e")
