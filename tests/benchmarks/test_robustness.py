"""The table solver x problem: what it counts, and that it sees what it is there to see."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from deq_lm.solvers import Broyden, Picard


def by_name(problems, name: str):
    return next(problem for problem in problems.suite(quick=True) if problem.name == name)


def test_quick_writes_every_solver_on_every_problem(robustness, monkeypatch, tmp_path, capsys):
    output = tmp_path / "robustness.json"
    names = ["Picard", "Broyden prefix 8", "Broyden sequence 8"]
    monkeypatch.setattr(sys, "argv", ["robustness.py", "--quick", "--output", str(output), "--solver", *names])
    assert robustness.main() == 0
    result = json.loads(output.read_text("utf-8"))
    assert {record["solver"] for record in result["records"]} == set(names)
    assert len(result["records"]) == len(result["problems"]) * len(names) * 2
    assert result["environment"]["torch"] == torch.__version__
    assert all(record["thrown_away"] == 0 for record in result["records"])
    printed = capsys.readouterr().out
    assert "| cells | 0.001 | Broyden prefix 8 |" in printed
    (row,) = [row for row in result["tables"]["sequences solved"] if row["solver"] == "Picard"]
    flags = [f for r in result["records"] if (r["family"], r["solver"]) == ("cells", "Picard") for f in r["converged"]]
    assert row["cells"] == f"{sum(flags)}/{len(flags)}"
    assert "Solved by Broyden over whole sequences and not over prefixes" in printed


def test_a_record_counts_converged_sequences_their_evaluations_and_outcomes(robustness):
    problem = by_name(robustness.suites, "affine radius=0.9 departure=1")
    record = robustness.measure(problem, "Picard", 1e-3, 100, [0.9, 0.9])
    assert record.converged == [True, True]
    assert record.outcomes == {"CONVERGED": 2}
    short = robustness.measure(problem, "Picard", 1e-3, 5, [0.9, 0.9])
    assert short.converged == [False, False]
    assert short.outcomes == {"MAX_STEPS": 2}
    assert short.evaluations == [6, 6]
    assert robustness._counts([record, short])[1] == str(max(record.evaluations))


def test_a_position_that_was_converged_and_is_no_longer_is_counted(robustness, monkeypatch):
    """A map that changes while it is solved leaves frozen positions where its solution no longer is."""
    problem = by_name(robustness.suites, "affine radius=0.9 departure=1")
    honest = robustness.measure(problem, "Broyden prefix 8", 1e-3, 100, [])
    assert honest.thrown_away == 0
    calls = 0

    def moving(z):
        nonlocal calls
        calls += 1
        return problem.f(z) + (0.0 if calls < 6 else 1.0)

    monkeypatch.setitem(robustness.SOLVERS, "moving", Broyden(history_size=8))
    moved = robustness.suites.Problem(name="moving", family="random", f=moving, z0=problem.z0, notes="")
    assert robustness.measure(moved, "moving", 0.3, 100, []).thrown_away > 0


def test_what_only_the_reference_solves_is_listed(robustness, monkeypatch):
    problem = by_name(robustness.suites, "tanh radius=0.9 departure=1")
    crippled = Broyden(history_size=1, restart_growth=1.0001)
    monkeypatch.setitem(robustness.SOLVERS, "crippled", crippled)
    names = ["crippled", "Broyden sequence 16", "Picard"]
    records = robustness.run_suite([problem], names, max_steps=28, report=False)
    found = robustness.losses(records)
    assert {case["solver"] for case in found} == {"crippled"}
    assert all("Broyden sequence 16" in case["solved_by"] for case in found)
    assert "crippled" in robustness.loss_table(found)


def test_a_solver_given_by_name_in_the_table_gets_its_rows(robustness, monkeypatch):
    monkeypatch.setitem(robustness.SOLVERS, "half", Picard(relaxation=0.5))
    problem = by_name(robustness.suites, "H-equation c=0.9")
    records = robustness.run_suite([problem], ["half", "Picard"], max_steps=50, report=False)
    assert "| classical | 0.001 | half | 2/2 |" in robustness.family_table(records)
    assert "half" in robustness.problem_table(records)


def test_prefix_solvers_are_not_run_on_maps_that_are_not_causal(robustness):
    problem = by_name(robustness.suites, "affine radius=0.9 departure=1")
    mixed = robustness.suites.Problem(
        name="mixed", family="random", f=lambda z: 0.5 * z.flip(1), z0=problem.z0 + 1, causal=False, notes=""
    )
    records = robustness.run_suite([mixed], ["Broyden prefix 8", "Broyden sequence 8"], max_steps=5, report=False)
    assert {record.solver for record in records} == {"Broyden sequence 8"}


@pytest.mark.parametrize("name", ["Nonsense"])
def test_an_unknown_solver_is_refused(robustness, monkeypatch, name, capsys):
    monkeypatch.setattr(sys, "argv", ["robustness.py", "--quick", "--solver", name])
    with pytest.raises(SystemExit):
        robustness.main()
    assert "Broyden prefix 16" in capsys.readouterr().err
