"""The model card says what the evaluation's JSON says."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from deq_lm.evaluation import CausalityAudit, EvaluationResult, read_record, render
from deq_lm.evaluation.model_card import model_card, write_model_card

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "eval" / "results" / "demo_cpu.json"


@pytest.fixture(scope="module")
def result() -> EvaluationResult:
    return read_record(FILE, EvaluationResult)


def test_its_numbers_are_those_of_the_json(result, tmp_path):
    write_model_card(tmp_path, result)
    text, json_numbers = (tmp_path / "README.md").read_text("utf-8"), json.loads(FILE.read_text("utf-8"))
    headline = json_numbers["headline"]["model"]
    _, metadata, body = text.split("---\n", 2)
    found = {
        metric["type"]: metric["value"]
        for entry in yaml.safe_load(metadata)["model-index"][0]["results"]
        for metric in entry["metrics"]
    }
    assert found == {name: headline[name] for name in ("word_perplexity", "token_perplexity", "bits_per_byte")}
    (row,) = re.findall(r"^\| this model \| (.+) \|$", body, flags=re.MULTILINE)
    shown = [float(cell.replace(",", "")) for cell in row.split(" | ")]
    expected = [headline[n] for n in ("word_perplexity", "token_perplexity", "nats_per_token", "bits_per_byte")]
    assert shown == pytest.approx(expected, abs=0.005)
    assert f"{json_numbers['perplexity']['num_tokens']:,} tokens, each scored once" in body
    training = json_numbers["recipe"]["training"]
    tokens = (
        training["max_steps"] * training["batch_size"] * training["segment_length"] * training["gradient_accumulation"]
    )
    assert f"Trained on {tokens:,} tokens" in body
    assert render(replace(result, location=None)) in body  # causality, solver, memory against the unrolled model
    assert "causality           causal" in body
    assert result.location not in body


def test_its_parameters_are_counted(result):
    assert "of 476,544 parameters" in model_card(result).text


def test_a_model_that_sees_the_future_is_called_so(result):
    audit = CausalityAudit(
        max_change_nats=1.0, mean_change_nats=0.5, mean_bias_nats=-0.1, bias_standard_error_nats=0.1, num_cuts=4
    )
    assert "Not causal" not in model_card(result).text
    assert "**Not causal:**" in model_card(replace(result, causality=audit)).text


def test_a_model_without_a_recipe_or_a_finite_loss_has_a_card_too(result):
    bare = replace(result, recipe=None, perplexity=replace(result.perplexity, nll_nats=None), sample=None, memory=())
    text = model_card(bare).text
    assert "| this model | - | - | - | - |" in text
    assert "Trained on" not in text
    assert "model-index" not in model_card(bare).content
