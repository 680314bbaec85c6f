"""eval/lm_harness.py: lm-evaluation-harness gives our perplexity, by a protocol that both can follow."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripts_of_eval import load
from tiny_run import make_recipe

from deq_lm.data.encoding import DataConfig, EncodedCorpus, prepare
from deq_lm.evaluation import EvaluationConfig, Perplexity, evaluate_perplexity
from deq_lm.evaluation.loading import load_model
from deq_lm.training import train

ROOT = Path(__file__).resolve().parents[2]
WINDOW = 16

needs_the_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm_eval is not installed: pip install -e '.[lm-eval]'"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """The final folder of a tiny run with each tokenizer."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        for tokenizer in ("bpe", "word_level"):
            folder = tmp_path_factory.mktemp(tokenizer)
            size = "data.vocab_size=300" if tokenizer == "bpe" else "data.vocab_size=null"
            train(make_recipe(folder, f"data.tokenizer={tokenizer}", size, "training.max_steps=4"))
            folders[tokenizer] = folder / "run" / "final"
    return folders


def corpus_of(final: Path, folder: Path, *, remainder: int) -> tuple[EncodedCorpus, Path]:
    """A test text of some windows and `remainder` more tokens, cut from that of the run; encoded, and its file."""
    text = (final.parents[1] / "text" / "test.txt").read_text("utf-8")
    for end in range(len(text), 0, -1):
        place = folder / str(end)
        place.mkdir()
        for split in ("train", "valid", "test"):
            (place / f"{split}.txt").write_text(text[:end], encoding="utf-8")
        data = DataConfig(corpus="text", data_dir=str(place), tokenizer=str(final), cache_dir=str(folder / "cache"))
        corpus = prepare(data)
        if corpus.splits["test"].num_tokens % WINDOW == remainder:
            assert corpus.splits["test"].num_tokens > 2 * WINDOW
            return corpus, place / "test.txt"
    raise AssertionError


def harness(final: Path, text: Path, folder: Path, *arguments: str, dtype: str = "float32") -> dict[str, Any]:
    """What lm_eval finds."""
    command = [sys.executable, str(ROOT / "eval" / "lm_harness.py"), "--model", "hf", "--tasks", "deq_lm_text"]
    command += ["--model_args", f"pretrained={final},dtype={dtype},softmax_dtype={dtype}", "--device", "cpu"]
    command += ["--include_path", str(ROOT / "eval" / "tasks"), "--output_path", str(folder / "out")]
    command += ["--metadata", json.dumps({"text": str(text)}), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (file,) = (folder / "out").rglob("*.json")
    return json.loads(file.read_text("utf-8"))["results"]["deq_lm_text"]


def ours(final: Path, corpus: EncodedCorpus, dtype: torch.dtype) -> Perplexity:
    """By the protocol of the harness: one stream, its windows, no memory."""
    model, _ = load_model(final)
    config = EvaluationConfig(batch_size=1, segment_length=WINDOW, mem_len=0)
    return evaluate_perplexity(model.to(dtype), corpus.splits["test"], config).perplexity


@needs_the_harness
@pytest.mark.parametrize("tokenizer", ["bpe", "word_level"])
def test_the_harness_finds_our_perplexities_where_the_text_fills_its_windows(runs, tokenizer, tmp_path):
    final = runs[tokenizer]
    corpus, text = corpus_of(final, tmp_path, remainder=0)
    found, expected = harness(final, text, tmp_path), ours(final, corpus, torch.float32)
    assert found["word_perplexity,none"] == pytest.approx(expected.word_perplexity, rel=1e-6)
    assert found["bits_per_byte,none"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
    assert math.log2(found["byte_perplexity,none"]) == pytest.approx(expected.bits_per_byte, rel=1e-6)


@needs_the_harness
def test_the_harness_gives_a_last_window_that_is_not_full_context_that_our_last_segment_lacks(runs, tmp_path):
    final = runs["bpe"]
    corpus, text = corpus_of(final, tmp_path, remainder=5)
    found = harness(final, text, tmp_path, "--batch_size", "3", dtype="float64")
    tokens = corpus.splits["test"].tokens.astype(np.int64)
    model, _ = load_model(final)
    model.double()
    whole = len(tokens) - 1 - 5
    with torch.no_grad():
        inputs = torch.from_numpy(np.stack([*tokens[:whole].reshape(-1, WINDOW), tokens[-WINDOW - 1 : -1]]))
        targets = torch.from_numpy(np.stack([*tokens[1 : whole + 1].reshape(-1, WINDOW), tokens[-WINDOW:]]))
        targets[-1, :-5] = -100
        nll_nats = sum(model(i[None], targets=t[None]).nll_nats.item() for i, t in zip(inputs, targets, strict=True))
    num_words = corpus.splits["test"].num_words
    assert math.log(found["word_perplexity,none"]) == pytest.approx(nll_nats / num_words, rel=1e-9)
    assert abs(ours(final, corpus, torch.float64).nll_nats - nll_nats) > 1e-4


def test_it_says_what_it_needs_and_shows_examples(monkeypatch, capsys):
    script = load("lm_harness")
    monkeypatch.setattr(sys, "argv", ["lm_harness.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 0
    assert "--tasks deq_lm_text" in capsys.readouterr().out
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["lm_harness.py", "--model", "hf"])
    assert script.main() == 2
    assert capsys.readouterr().err == "eval/lm_harness.py: lm_eval is not installed: pip install -e '.[lm-eval]'\n"


def test_the_task_without_a_text_and_a_model_says_so():
    task = load("tasks/deq_lm_text")
    with pytest.raises(ValueError, match="needs a text and a model: give --metadata"):
        task.load(pretrained="anything")
