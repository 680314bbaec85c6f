"""Every script explains itself, and fails in one line with the exit code that it names."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("scripts", "eval")
    for path in (ROOT / folder).rglob("*.py")
    if path.read_text("utf-8").startswith("#!")
)
MISTAKES = {
    "scripts/train_lm.py": ["missing.yaml"],
    "scripts/count_parameters.py": ["missing.yaml"],
    "scripts/prepare_data.py": [
        "--corpus",
        "text",
        "--data-dir",
        "missing",
        "--tokenizer",
        "bpe",
        "--vocab-size",
        "300",
        "--output",
        "out",
    ],
    "eval/compare.py": ["missing", "missing"],
    "eval/evaluate.py": ["missing"],
    "eval/report.py": ["missing"],
    "eval/run.py": ["missing"],
    "eval/benchmarks/adjoint_reuse.py": ["--model", "missing", "--output", "out.json"],
    "eval/benchmarks/robustness.py": ["--quick", "--model", "missing"],
    **{
        f"eval/benchmarks/{name}.py": ["--output", "missing/out.json"]
        for name in ("generation", "monotone", "multiscale", "resolvent", "solvers", "starts", "training_step")
    },
}


def call(monkeypatch, script: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))  # where Python looks for a script's neighbours
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return caught.value.code


def test_there_are_scripts_and_all_that_can_be_called_with_a_mistake_are_among_them():
    assert len(SCRIPTS) > 12
    assert MISTAKES.keys() <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_examples_that_name_the_script_and_the_exit_codes(script, monkeypatch, capsys):
    assert call(monkeypatch, script, "--help") == 0
    text = capsys.readouterr().out
    assert script in text[text.index("examples:") :]
    assert "2 a mistake" in text[text.index("exit codes:") :]


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_option_is_a_mistake_in_the_call(script, monkeypatch, capsys):
    if script == "eval/lm_harness.py":
        pytest.skip("its options are those of lm_eval")
    assert call(monkeypatch, script, "--no-such-option") == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("script", MISTAKES)
def test_a_mistake_is_told_in_one_line(script, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, script, *MISTAKES[script]) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    assert "missing" in output.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "work"),
    [
        ("scripts/prepare_data.py", "deq_lm.data.encoding.prepare_into"),
        ("scripts/count_parameters.py", "deq_lm.training.load_recipe"),
    ],
)
def test_an_interruption_ends_it_with_130_and_without_a_traceback(script: str, work: str, monkeypatch, capsys):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work, interrupted)
    assert call(monkeypatch, script, *MISTAKES[script]) == 130
    assert capsys.readouterr().err == ""
