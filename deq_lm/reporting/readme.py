"""Numbers in prose: tables and the demo's output, put where a comment in the text names the file they come from.

<!-- eval/results/solvers.json: memory -->        before a Markdown table: the columns of its header, of that table
<!-- demo: eval/results/demo_cpu.json -->         before a block of text: the evaluation as it is printed
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from deq_lm.evaluation import EvaluationResult, read_record, render
from deq_lm.evaluation.tables import markdown_table

TABLE = re.compile(r"<!-- (eval/[\w/]+\.json): (.+?) -->\n\n((?:\|.*\n)+)")
DOCUMENTS = ("README.md", "deq_lm/cells/README.md", "eval/results/README.md")
"""What is filled in, from the root."""
DEMO = re.compile(r"<!-- demo: (\S+) -->\n\n```text\n(.*?)\n```", flags=re.DOTALL)


def with_numbers(text: str, root: Path) -> str:
    """`text` with all numbers as they are in the files, whose paths are relative to `root`.

    Raises:
        DataError: the demo's result cannot be read.
        KeyError: a table or a column is not in its file.
    """

    def table(match: re.Match[str]) -> str:
        file, title, old = match.groups()
        rows = json.loads((root / file).read_text("utf-8"))["tables"][title]
        columns = [cell.strip() for cell in old.splitlines()[0].strip("|").split("|")]
        new = markdown_table([{column: row[column] for column in columns} for row in rows])
        return f"<!-- {file}: {title} -->\n\n{new}\n"

    def demo(match: re.Match[str]) -> str:
        return f"<!-- demo: {match[1]} -->\n\n```text\n{render(read_record(root / match[1], EvaluationResult))}\n```"

    return DEMO.sub(demo, TABLE.sub(table, text))
