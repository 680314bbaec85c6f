"""scripts/generate.py on a real, tiny run: what it writes, how it shows compute, and how it exits."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deq_lm.evaluation import Decoding, load_model, model_folder, write_text
from deq_lm.modeling import DEQLMConfig, DEQLMForCausalLM

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "generate.py"


def call(monkeypatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return caught.value.code


def test_it_continues_the_prompt_and_repeats_for_a_seed(monkeypatch, capsys, finished: Path):
    texts = []
    for seed in (0, 0, 1):
        assert call(monkeypatch, finished, "abc de", "--num-tokens", "30", "--seed", str(seed), "--past-end") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("abc de") and len(text) > 12 for text in texts)
    assert call(monkeypatch, finished, "--num-tokens", "5") == 0  # no prompt begins a document


def test_the_pieces_are_the_text_and_come_with_the_evaluations_that_predicted_them(finished: Path):
    model, tokenizer = load_model(model_folder(finished))
    pieces = []
    decoding = Decoding(num_tokens=40, max_evaluations=3)
    sample = write_text(model, tokenizer, "é漢", decoding, on_text=lambda *piece: pieces.append(piece))
    assert "".join(text for text, _ in pieces) == sample.text
    assert all(1 <= number <= 3 for _, number in pieces)
    assert len(pieces) > 10
    assert write_text(model, tokenizer, "é漢", decoding) == sample
    assert len(sample.num_evaluations) == 40
    assert set(sample.num_evaluations) >= {number for _, number in pieces}


def test_a_character_of_several_tokens_is_one_piece(finished: Path):
    model, tokenizer = load_model(model_folder(finished))
    wanted = tokenizer.encode("漢é", add_special_tokens=False)
    assert len(wanted) > 2
    logits = iter(torch.nn.functional.one_hot(torch.tensor(wanted), len(tokenizer)).float())

    def prefer(_module, _inputs, output):
        output.logits = 1e9 * next(logits)[None, None]

    model.register_forward_hook(prefer)
    pieces = []
    decoding = Decoding(num_tokens=len(wanted), temperature=0.0)
    sample = write_text(model, tokenizer, "", decoding, on_text=lambda text, _: pieces.append(text))
    assert sample.text == "漢é"
    assert pieces == ["漢", "é"]
    logits = iter(torch.nn.functional.one_hot(torch.tensor(wanted), len(tokenizer)).float())
    pieces.clear()
    decoding = Decoding(num_tokens=len(wanted) - 1, temperature=0.0)
    sample = write_text(model, tokenizer, "", decoding, on_text=lambda text, _: pieces.append(text))
    assert "".join(pieces) == sample.text == "漢\N{REPLACEMENT CHARACTER}"  # half a character is shown at the end


def test_compute_is_shown_by_numbers_or_in_a_terminal_by_colours(monkeypatch, capsys, finished: Path):
    arguments = (finished, "a", "--num-tokens", "8", "--show-compute", "--max-evaluations", "2", "--past-end")
    assert call(monkeypatch, *arguments) == 0
    shown = capsys.readouterr()
    numbers = re.findall(r"\[(\d)\]", shown.out)
    assert set(numbers) <= {"1", "2"}
    assert len(numbers) > 2
    assert "evaluations a token: mean" in shown.err
    assert "most 2, of 2, in 8 tokens" in shown.err
    assert "\n[" not in shown.out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert call(monkeypatch, *arguments) == 0
    coloured = capsys.readouterr().out
    assert len(re.findall("\x1b\\[38;5;\\d+m.*?\x1b\\[0m", coloured, flags=re.DOTALL)) == len(numbers)
    plain = re.sub("\x1b\\[[0-9;]*m", "", coloured)
    assert plain == re.sub(r"\[\d\]", "", shown.out)


def test_a_long_prompt_is_solved_a_window_at_a_time(finished: Path):
    model, tokenizer = load_model(model_folder(finished))
    lengths = []
    model.register_forward_pre_hook(
        lambda _module, _inputs, options: lengths.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    sample = write_text(model, tokenizer, "abcd " * 20, Decoding(num_tokens=3))
    assert max(lengths) == model.config.mem_len
    assert len(sample.num_evaluations) == 3


def test_weights_that_are_not_finite_are_refused_by_name(monkeypatch, capsys, finished: Path, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(finished / "final", broken)
    model = DEQLMForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 1] = float("nan")
    model.save_pretrained(broken)
    assert call(monkeypatch, broken, "a") == 2
    assert "model.embed_tokens.weight has values that are not finite" in capsys.readouterr().err


def test_a_prompt_that_is_no_text_is_refused_before_anything_is_written(monkeypatch, capsys, finished: Path):
    assert call(monkeypatch, finished, "ab\udcff") == 2
    written, error = capsys.readouterr()
    assert written == ""
    assert "PROMPT is not UTF-8, from character 2 on" in error


def test_when_nobody_reads_on_it_ends_without_a_word(finished: Path):
    command = [sys.executable, str(SCRIPT), str(finished), "abc", "--num-tokens", "100000", "--past-end"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.read(3) == "abc"
        process.stdout.close()
        process.wait(timeout=60)
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_control_characters_of_a_text_do_not_reach_the_terminal(monkeypatch, capsys, finished: Path):
    assert call(monkeypatch, finished, "a\x1b[2Jb", "--num-tokens", "1") == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-p", "0"], "top_p=0.0: expected a probability"),
        (["--temperature", "-1"], "temperature=-1.0: expected 0"),
        (["--num-tokens", "0"], "num_tokens=0: expected 1 or more"),
        (["--max-evaluations", "0"], "max_evaluations=0: expected 1 to"),
        (["--max-evaluations", "9" * 20], "99: expected 1 to"),
        (["--top-k", "-1"], "top_k=-1: expected 0"),
        (["--seed", "-1"], "seed=-1: expected 0 to"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(monkeypatch, capsys, finished: Path, arguments, message: str):
    assert call(monkeypatch, finished, "a", *arguments) == 2
    written, error = capsys.readouterr()
    assert written == ""
    assert message in error
    assert error.startswith("generate: ")
    assert error.count("\n") == 1


def test_what_is_no_model_or_has_another_tokenizer_is_refused_in_one_line(
    monkeypatch, capsys, finished: Path, tmp_path
):
    other = tmp_path / "other"
    shutil.copytree(finished / "final", other)
    config = json.loads((other / "config.json").read_text())
    DEQLMForCausalLM(DEQLMConfig(**{**config, "vocab_size": config["vocab_size"] + 1})).save_pretrained(other)
    as_large = tmp_path / "as_large"
    shutil.copytree(finished / "final", as_large)
    tokenizer = json.loads((as_large / "tokenizer.json").read_text())
    entries = tokenizer["model"]["vocab"]
    first, second = (entry for entry in list(entries)[-2:])
    entries[first], entries[second] = entries[second], entries[first]
    (as_large / "tokenizer.json").write_text(json.dumps(tokenizer))
    for place, message in (
        (tmp_path / "nowhere", "no such folder"),
        (other, "the tokenizer has"),
        (as_large, "the tokenizer has other entries than that of the model's training"),
    ):
        assert call(monkeypatch, place, "a") == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert call(monkeypatch, finished, "--no-such-option") == 2


def test_compute_of_a_model_that_solves_nothing_is_refused(monkeypatch, capsys, finished: Path, tmp_path):
    other = tmp_path / "unrolled"
    shutil.copytree(finished / "final", other)
    config = json.loads((other / "config.json").read_text())
    DEQLMForCausalLM(
        DEQLMConfig(vocab_size=config["vocab_size"], cell=config["cell"], depth="unrolled", num_layers=3)
    ).save_pretrained(other)
    assert call(monkeypatch, other, "a", "--num-tokens", "3") == 0
    assert call(monkeypatch, other, "a", "--show-compute") == 2
    assert "solves nothing" in capsys.readouterr().err


def test_an_interruption_ends_it_with_what_is_written(finished: Path):
    command = [sys.executable, str(SCRIPT), str(finished), "abc", "--num-tokens", "100000", "--past-end"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # as in a terminal
    ) as process:
        assert process.stdout.read(8).startswith("abc")
        process.send_signal(signal.SIGINT)
        rest, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.endswith("\n")
    assert error == ""


def test_help_shows_examples(monkeypatch, capsys):
    assert call(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert "exit codes:" in text
