"""The README is executed: its Python blocks run, its files exist, its numbers are those of the committed result."""

import json
import re
import shlex
from pathlib import Path

import pytest

from deq_lm.evaluation.tables import markdown_table
from deq_lm.modeling import builders

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
def test_a_python_block_runs(code: str, monkeypatch):
    monkeypatch.setattr(builders, "CELLS", dict(builders.CELLS))  # a block may add to it
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_the_files_it_names_exist():
    names = re.findall(r"`([\w/.]+\.(?:py|yaml|txt|json))`", README)
    folder = ROOT
    assert len(names) > 10
    for name in names:
        path = ROOT / name if "/" in name or name == "constraints.txt" else folder / name
        folder = path.parent if "/" in name else folder
        assert path.exists() or list(ROOT.glob(f"deq_lm/*/{name}")) or name in ("metrics.jsonl",), name


def test_the_commands_it_gives_name_files_recipes_and_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for language, code in BLOCKS:
        for line in code.splitlines() if language == "bash" else ():
            words = shlex.split(line, comments=True)
            if words[0] == "make":
                assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), line
            for word in words:
                if word.startswith(("scripts/", "eval/", "recipes/")):
                    assert (ROOT / word).exists(), line


def test_the_layers_it_draws_are_those_that_are_checked():
    (drawn,) = [code for language, code in BLOCKS if language == "text" and code.startswith("scripts, eval")]
    checked = re.search(r"^layers = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert checked is not None
    assert drawn.splitlines()[1:] == re.findall(r'"(.+?)"', checked[1])


def test_the_demo_table_is_the_committed_result():
    from deq_lm.evaluation import EvaluationResult, read_record
    from deq_lm.evaluation.report import render

    place = re.search(r"<!-- demo: (\S+) -->\n\n```text\n(.*?)\n```", README, flags=re.DOTALL)
    assert place is not None
    result = read_record(ROOT / place[1], EvaluationResult)
    assert place[2] == render(result)
    loses = result.perplexity.nats_per_token > result.bigram.nats_per_token
    assert loses == ("the model loses to\nthe bigram" in README)


TABLES = re.findall(r"<!-- (eval/results/\w+\.json): (.+?) -->\n\n((?:\|.*\n)+)", README)


@pytest.mark.parametrize(("file", "title", "table"), TABLES, ids=[title for _, title, _ in TABLES])
def test_a_table_holds_the_numbers_of_its_result_file(file: str, title: str, table: str):
    rows = json.loads((ROOT / file).read_text("utf-8"))["tables"][title]
    columns = [cell.strip() for cell in table.splitlines()[0].strip("|").split("|")]
    assert table.strip() == markdown_table([{column: row[column] for column in columns} for row in rows])


def test_the_benchmarks_are_among_the_tables():
    assert {file for file, _, _ in TABLES} >= {"eval/results/solvers.json", "eval/results/training_step.json"}
