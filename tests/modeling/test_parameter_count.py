"""Parameters counted without allocating them, and a rival with as many."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deq_lm import DEQLMForCausalLM
from deq_lm.errors import ConfigError
from deq_lm.modeling import build_config, count_parameters, matching_stack

ROOT = Path(__file__).resolve().parents[2]
MODEL = {
    "cell": {"name": "transformer_xl", "d_model": 32, "num_heads": 2, "d_inner": 200},
    "solver": {"name": "picard"},
}


@pytest.mark.parametrize("depth", [{}, {"depth": "unrolled", "num_layers": 7}, {"depth": "stack", "num_layers": 3}])
def test_the_count_is_that_of_the_model_and_a_tie_is_counted_once(depth: dict):
    config = build_config({"cell": MODEL["cell"], **depth}, vocab_size=50)
    count, model = count_parameters(config), DEQLMForCausalLM(config)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    assert count.embedding == 50 * 32
    block = 8 * 32**2 + 2 * 32 + (2 * 200 * 32 + 200 + 32) + 4 * 32  # attention, its biases, feed-forward, norms
    assert count.other == block * (3 if "stack" in depth.values() else 1)


def test_gates_are_counted_and_leave_the_feed_forward_network_as_much_less_at_equal_parameters():
    gated = {**MODEL["cell"], "gate": "highway"}
    count, plain = (count_parameters(build_config({"cell": cell}, 50)).other for cell in (gated, MODEL["cell"]))
    assert count == plain + 2 * 32 * 33
    narrower = {**gated, "d_inner": 200 - 32}
    assert count_parameters(build_config({"cell": narrower}, 50)).other == pytest.approx(plain, rel=0.005)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("extra", [{}, {"weight_norm": True}, {"num_blocks": 3}, {"gate": "highway"}])
def test_a_stack_has_the_width_and_the_parameters_of_its_rival(num_layers: int, extra: dict):
    model = {**MODEL, "cell": {**MODEL["cell"], **extra}}
    stack = build_config(matching_stack(model, num_layers, vocab_size=50), vocab_size=50)
    assert (stack.depth, stack.num_layers, stack.d_model) == ("stack", num_layers, 32)
    assert stack.cell["injection"] == "none"
    found, wanted = count_parameters(stack), count_parameters(build_config(model, vocab_size=50))
    assert found.embedding == wanted.embedding
    assert found.other == pytest.approx(wanted.other, rel=0.005)


def test_a_stack_that_cannot_match_is_refused():
    with pytest.raises(
        ConfigError, match=r"a stack of 9 layers of width 32 has 4.,... parameters with d_inner=1.*Take fewer"
    ):
        matching_stack(MODEL, 9, vocab_size=50)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/count_parameters.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_the_script_prints_both_counts():
    done = run("recipes/benchmark_cell.yaml", "--stack", "2")
    assert done.returncode == 0, done.stderr
    header, model, stack = done.stdout.splitlines()
    assert header.split() == ["total", "embedding", "other"]
    totals = [int(line.split()[-3].replace(",", "")) for line in (model, stack)]
    assert totals[1] == pytest.approx(totals[0], rel=0.005)
    assert "stack of 2, d_inner" in stack


def test_the_script_says_in_a_line_what_is_wrong():
    done = run("recipes/benchmark_cell.yaml", "--stack", "40")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Take fewer layers" in done.stderr
