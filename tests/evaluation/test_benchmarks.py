"""The benchmarks run, on little."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scripts_of_eval import load

from deq_lm.errors import DataError
from deq_lm.evaluation.tables import write_json

FOLDER = Path(__file__).resolve().parents[2] / "eval" / "benchmarks"


def test_the_reversal_benchmark_prints_a_table_and_writes_its_numbers(tmp_path: Path):
    output = tmp_path / "reversible.json"
    command = [sys.executable, str(FOLDER / "reversible.py"), "--output", str(output), "--steps", "1", "20"]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads(output.read_text("utf-8"))
    assert {"torch", "cpu", "commit"} <= result["environment"].keys()
    rows = result["rows"]
    assert len(run.stdout.splitlines()) == 2 + len(rows) == 2 + 2 * 2 * 2 * 2
    for row in rows:
        state, gradient = row["errors"]["lattice"]
        assert state == 0
        assert gradient <= (1e-6 if row["dtype"] == "float32" else 1e-14)
        if row["num_steps"] == 20 and row["map"] == "transformer_xl" and row["dtype"] == "float32":
            assert row["errors"]["published"][1] > 1e-3


BENCHMARKS = [path.stem for path in FOLDER.glob("*.py") if "--output" in path.read_text("utf-8")]


@pytest.mark.parametrize("name", [*BENCHMARKS, "adjoint_reuse", "generation", "solvers", "training_step"])
def test_no_benchmark_writes_over_the_committed_results_unless_it_is_told_to(name: str):
    if name in ("measure", "robustness"):  # is none; writes nothing by default
        return
    text = (FOLDER / f"{name}.py").read_text("utf-8")
    defaults = (f'default_output("{name}")', f'benchmark_parser(__doc__, "{name}")', f'Path("results/{name}.json")')
    assert any(default in text for default in defaults)
    assert "parents[1] / " not in text


def test_the_folder_of_the_default_may_be_missing_and_no_other(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measure = load("benchmarks/measure")
    default = measure.benchmark_parser("", "solvers").parse_args([]).output
    assert default == Path("results/solvers.json")
    measure.check_own_output(default)
    assert not default.parent.exists()
    write_json(default, {})
    assert default.is_file()
    with pytest.raises(DataError, match="no such folder"):
        measure.check_own_output(Path("elsewhere/solvers.json"))
