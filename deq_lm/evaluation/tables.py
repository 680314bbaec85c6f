"""Tables of measured numbers: as Markdown, and as JSON with what they were measured on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deq_lm.evaluation.records import provenance


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of one set of keys as a Markdown table; floats with three digits."""
    if not rows:
        return "(nothing)"
    header = list(rows[0])

    def show(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [header, ["---"] * len(header), *([show(row[key]) for key in header] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` with date, versions and machine; the folder is made if only it is missing."""
    path.parent.mkdir(exist_ok=True)
    made = provenance()
    record = {"created": made["created"], "environment": made["environment"], **content}
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"\nwritten: {path}")
