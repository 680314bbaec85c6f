"""The benchmarks run, on little."""

import json
import subprocess
import sys
from pathlib import Path

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
