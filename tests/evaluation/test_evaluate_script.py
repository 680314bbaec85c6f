"""eval/evaluate.py on the folder of a real, tiny run: what it prints and writes, and how it exits."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config

from deq_lm.evaluation import EvaluationResult, read_record
from deq_lm.modeling import DEQLMConfig, DEQLMForCausalLM
from deq_lm.training.checkpoint import damage

SCRIPT = Path(__file__).resolve().parents[2] / "eval" / "evaluate.py"


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def call(monkeypatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return caught.value.code


def test_it_finds_the_numbers_that_the_end_of_training_found(monkeypatch, run, capsys):
    written = run / "final" / "evaluation.json"
    by_training = read_record(written, EvaluationResult)
    written.unlink()
    for place in (run, run / "final"):
        assert call(monkeypatch, place) == 0
        result = read_record(written, EvaluationResult)
        assert result.perplexity == by_training.perplexity
        assert (result.unigram, result.bigram) == (by_training.unigram, by_training.bigram)
        assert (result.solves, result.causality, result.no_op) == (
            by_training.solves,
            by_training.causality,
            by_training.no_op,
        )
        assert result.data_fingerprint == by_training.data_fingerprint
    captured = capsys.readouterr()
    assert f"{result.perplexity.word_perplexity:,.2f}" in captured.out
    assert f"written to {written}" in captured.out
    assert captured.err == ""


def test_a_checkpoint_is_measured_without_breaking_its_seal(monkeypatch, run):
    checkpoint = run / "checkpoints" / "step_00000004"
    assert call(monkeypatch, checkpoint) == 0
    assert read_record(checkpoint.with_name("step_00000004.evaluation.json"), EvaluationResult).perplexity == (
        read_record(run / "final" / "evaluation.json", EvaluationResult).perplexity
    )
    assert damage(checkpoint) is None


def test_another_split_text_or_setting_is_measured_into_another_file(monkeypatch, run, tmp_path):
    before = (run / "final" / "evaluation.json").read_bytes()
    assert call(monkeypatch, run, "--split", "valid") == 0
    assert read_record(run / "final" / "evaluation_text_valid.json", EvaluationResult).split == "valid"
    assert call(monkeypatch, run, "evaluation.segment_length=4") == 0
    assert read_record(run / "final" / "evaluation_text_test.json", EvaluationResult).evaluation.segment_length == 4
    texts = tmp_path / "texts"
    texts.mkdir()
    for split in ("train", "valid", "test"):
        (texts / f"{split}.txt").write_text("abc def gha bcd\n" * 20, encoding="utf-8")
    output = tmp_path / "other.json"
    assert call(monkeypatch, run, "--corpus", "text", "--data-dir", texts, "--output", output) == 0
    other = read_record(output, EvaluationResult)
    assert other.perplexity.num_words == 80
    assert other.recipe["data"]["data_dir"] == str(texts)
    assert (run / "final" / "evaluation.json").read_bytes() == before


def no_model(run: Path) -> Path:
    shutil.rmtree(run / "final")
    return run


def no_recipe(run: Path) -> Path:
    (run / "recipe.yaml").unlink()
    return run


def truncated(run: Path) -> Path:
    path = run / "final" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return run


def altered(run: Path) -> Path:
    path = run / "checkpoints" / "step_00000004" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path.parent


def other_model(run: Path) -> Path:
    path = run / "final" / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config["cell"]["d_inner"] += 8
    path.write_text(json.dumps(config), encoding="utf-8")
    return run


def with_tensors(run: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    path = run / "final" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return run


def without_a_tensor(run: Path) -> Path:
    return with_tensors(run, lambda tensors: tensors.pop("model.layers.cell.merge.weight"))


def with_a_tensor_more(run: Path) -> Path:
    return with_tensors(run, lambda tensors: tensors.update({"model.layers.cell.gate": torch.zeros(2)}))


def other_kind(run: Path) -> Path:
    GPT2Config().save_pretrained(run / "final")
    return run


def other_vocabulary(run: Path) -> Path:
    config = DEQLMConfig.from_pretrained(run / "final")
    config.vocab_size += 1
    DEQLMForCausalLM(config).save_pretrained(run / "final")
    return run


def missing_weights(run: Path) -> Path:
    (run / "final" / "model.safetensors").unlink()
    return run


def no_tokenizer(run: Path) -> Path:
    (run / "final" / "tokenizer.json").unlink()
    return run


@pytest.mark.parametrize(
    ("damaged", "words"),
    [
        (lambda run: run / "absent", "no such folder"),
        (no_model, "holds no model"),
        (no_recipe, "--recipe"),
        (truncated, "cannot be loaded"),
        (altered, "differs from its size or SHA-256"),
        (other_model, "mismatched keys model.layers.cell."),
        (without_a_tensor, "missing keys model.layers.cell.merge.weight."),
        (with_a_tensor_more, "unexpected keys model.layers.cell.gate."),
        (other_kind, "of type gpt2, not deq_lm"),
        (other_vocabulary, "tokenizer has"),
        (missing_weights, "no model.safetensors"),
        (no_tokenizer, "tokenizer.json, as save_pretrained"),
    ],
)
def test_a_damaged_or_unfitting_checkpoint_is_one_line_and_exit_two(monkeypatch, run, capsys, damaged, words):
    place = damaged(run)
    before = sorted(run.rglob("*"))
    capsys.readouterr()
    assert call(monkeypatch, place) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("eval/evaluate.py: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert captured.out == ""
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluation.batch_sise=4"], "did you mean batch_size"),
        (["--corpus", "wikitext"], "corpus 'wikitext' is not known"),
        (["--data-dir", "/absent/texts"], "/absent/texts"),
        (["--output", "/absent/folder/file.json"], "/absent/folder: no such folder"),
        (["--recipe", "/absent/recipe.yaml"], "/absent/recipe.yaml"),
    ],
)
def test_a_mistake_in_the_call_is_one_line_and_exit_two(monkeypatch, finished, capsys, arguments, words):
    assert call(monkeypatch, finished, *arguments) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert words in message


def test_help_and_a_mistyped_option_do_not_wait_for_torch():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['evaluate.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print(end.code, 'torch' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "0 False"
    assert "examples:" in result.stdout


def test_loading_leaves_the_weights_as_they_were_saved(finished):
    from deq_lm.evaluation.loading import load_model

    model, tokenizer = load_model(finished / "final")
    saved = DEQLMForCausalLM.from_pretrained(finished / "final").state_dict()
    assert not model.training
    assert len(tokenizer) == model.config.vocab_size
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
