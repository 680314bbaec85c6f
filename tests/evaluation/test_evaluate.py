"""One evaluation from end to end on the real, tiny model: what is measured, written, read back and printed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re

import numpy as np
import pytest
import torch

from deq_lm.data.encoding import EncodedCorpus, EncodedSplit
from deq_lm.data.tokenizers import bpe, encode_documents
from deq_lm.errors import DataError
from deq_lm.evaluation import (
    CausalityAudit,
    EvaluationConfig,
    EvaluationResult,
    Perplexity,
    evaluate,
    evaluate_perplexity,
    read_record,
    render,
    write_record,
)
from deq_lm.evaluation.ngram import Bigram, Unigram
from deq_lm.evaluation.records import SCHEMA_VERSION
from deq_lm.evaluation.sample import Sample, printable, sample_text
from deq_lm.modeling import DEQLMConfig, DEQLMForCausalLM

DOCUMENT = "The cat sat on the mat, and the dog sat on the cat. " * 3
CONFIG = EvaluationConfig(
    batch_size=2,
    segment_length=12,
    max_segments=1,  # of validations only
    causality_cuts=16,
    no_op_segments=1,
    unroll_depths=(2, 4),
    sample_prompt="The ",
    sample_tokens=5,
)


@pytest.fixture(scope="module")
def corpus() -> EncodedCorpus:
    tokenizer = bpe.train([DOCUMENT], 290)
    splits = {}
    for name, copies in (("train", 6), ("valid", 1), ("test", 2)):
        (ids,) = encode_documents(tokenizer, [DOCUMENT])
        eos = [tokenizer.eos_token_id]
        tokens = np.array(eos + (ids + eos) * copies, dtype=np.uint16)
        splits[name] = EncodedSplit(tokens=tokens, num_words=36 * copies, num_bytes=len(DOCUMENT) * copies)
    return EncodedCorpus(tokenizer=tokenizer, splits=splits, fingerprint="f00d")


def make_model(vocab_size: int, **settings) -> DEQLMForCausalLM:
    torch.manual_seed(0)
    cell = {"name": "transformer_xl", "d_model": 16, "num_heads": 2, "d_inner": 24, "mem_len": 6, "init_std": 0.2}
    settings = {"stopping": {"max_steps": 20, "rtol": 1e-4}, **settings}
    return DEQLMForCausalLM(DEQLMConfig(vocab_size=vocab_size, cell=cell, eos_token_id=0, **settings))


@pytest.fixture(scope="module")
def result(corpus):
    model = make_model(len(corpus.tokenizer))
    return evaluate(model, corpus, CONFIG, seed=3, location="runs/x/final", recipe={"name": "x"})


def test_the_whole_split_is_scored_and_the_same_targets_by_the_baselines(corpus, result):
    split = corpus.splits["test"]
    model = make_model(len(corpus.tokenizer))
    whole = evaluate_perplexity(model, split, dataclasses.replace(CONFIG, max_segments=None))
    assert result.perplexity == whole.perplexity
    assert result.solves == whole.solves
    assert result.perplexity.num_tokens == split.num_tokens
    assert result.perplexity.num_words == 72
    train, vocab_size = corpus.splits["train"].tokens, model.config.vocab_size
    assert result.unigram.nll_nats == Unigram.fit(train, vocab_size).nll_nats(split.tokens).sum()
    assert result.bigram.nll_nats == Bigram.fit(train, vocab_size).nll_nats(split.tokens).sum()
    assert result.bigram.num_words == result.unigram.num_words == 72


def test_the_record_says_on_what_and_with_what(result):
    assert (result.split, result.data_fingerprint, result.seed, result.location) == ("test", "f00d", 3, "runs/x/final")
    assert result.model["cell"]["mem_len"] == 6
    assert result.precision == "float32"
    assert result.environment["torch"] == torch.__version__
    assert result.causality.is_causal
    assert result.no_op.num_tokens == 24
    assert [row.depth for row in result.memory] == [2, 4]
    assert result.memory_shape == (1, 12, 6)
    assert result.sample.prompt == "The "


def test_a_result_reads_back_equal_with_its_headline_beside_it(result, tmp_path):
    path = tmp_path / "evaluation.json"
    write_record(path, result)
    assert read_record(path, EvaluationResult) == result
    headline = json.loads(path.read_text("utf-8"))["headline"]
    assert headline["model"]["word_perplexity"] == result.perplexity.word_perplexity
    assert headline["is_causal"] is True


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(result, tmp_path, monkeypatch, failing):
    path = tmp_path / "evaluation.json"
    write_record(path, result)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(DataError, match="No space left"):
        write_record(path, dataclasses.replace(result, seed=4))
    assert read_record(path, EvaluationResult).seed == 3
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(DataError, match="cannot be written"):
        write_record(tmp_path / "absent" / "evaluation.json", result)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "cannot be read as JSON"),
        (lambda text: "[1]", "no schema_version"),
        (
            lambda text: text.replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 7'),
            "schema_version 7; this deq_lm reads",
        ),
        (
            lambda text: text.replace('"num_cuts"', '"num_cut"'),
            "evaluation.causality.num_cut: unknown key; did you mean",
        ),
        (lambda text: text.replace('"split": "test"', '"split": 5'), "evaluation.split: expected text"),
    ],
)
def test_a_damaged_file_or_one_of_another_version_is_refused_in_one_line(result, tmp_path, damage, message):
    path = tmp_path / "evaluation.json"
    write_record(path, result)
    text = path.read_text("utf-8")
    path.write_text(damage(text), encoding="utf-8")
    assert path.read_text("utf-8") != text
    with pytest.raises(DataError, match=message) as caught:
        read_record(path, EvaluationResult)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no such file"):
        read_record(tmp_path / "absent.json", EvaluationResult)


def test_an_unrolled_model_has_neither_a_solve_to_check_nor_a_memory_table(corpus):
    model = make_model(len(corpus.tokenizer), depth="unrolled", num_layers=3, stopping=None)
    result = evaluate(model, corpus, dataclasses.replace(CONFIG, sample_tokens=0))
    assert result.no_op is None
    assert result.memory == ()
    assert result.sample is None
    assert result.solves.max_evaluations == 3
    assert "unrolled, 3 layers" in render(result)


def test_evaluating_leaves_the_model_in_training_mode_and_the_random_state_alone(corpus):
    model = make_model(len(corpus.tokenizer)).train()
    before = torch.get_rng_state()
    evaluate(model, corpus, CONFIG)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_report_shows_every_number_and_stays_within_100_columns(result):
    report = render(result)
    assert max(map(len, report.splitlines())) <= 100
    words = " ".join(report.split())  # however it is broken into lines
    for value in (
        f"{result.perplexity.word_perplexity:,.2f}",
        f"{result.perplexity.token_perplexity:,.2f}",
        f"{result.perplexity.nats_per_word:.4f}",
        f"{result.perplexity.bits_per_byte:.4f}",
        f"{result.bigram.token_perplexity:,.2f}",
        f"{result.unigram.token_perplexity:,.2f}",
        f"{result.perplexity.num_tokens:,} tokens, 72 words",
        "broyden, prefix scope, at most 20 steps, rtol 0.0001",
        "converged",
        f"{result.solves.max_residual:.1e}",
        "causal: other text after a cut changes an earlier log-probability by at most 0 nats",
        f"{result.no_op.first_nats_per_token:.3f}",
        f"{result.memory[1].unrolled_bytes / 1e6:,.3f}",
        f"{result.memory[1].unrolled_bytes / result.memory[1].equilibrium_bytes:.2f}",
        "after 'The '",
        "runs/x/final",
        f"torch {torch.__version__}",
    ):
        assert value in words
    assert "NOT CAUSAL" not in report


def test_the_report_of_a_leaking_model_says_so_beside_its_perplexity(result):
    leaking = CausalityAudit(
        max_change_nats=1.5, mean_change_nats=0.01, mean_bias_nats=-0.02, bias_standard_error_nats=0.01, num_cuts=16
    )
    report = render(dataclasses.replace(result, causality=leaking))
    assert report.count("NOT CAUSAL") == 2
    assert "at most 1.5 nats" in " ".join(report.split())


def test_what_a_reader_has_to_know_of_the_text_stands_beside_the_numbers(corpus):
    known = dataclasses.replace(corpus, caveats=("the train split has 9 words",))
    result = evaluate(make_model(len(corpus.tokenizer)), known, dataclasses.replace(CONFIG, sample_tokens=0))
    assert result.caveats == ("the train split has 9 words",)
    assert re.search(r"^CAUTION +the train split has 9 words$", render(result), flags=re.MULTILINE)


def test_the_report_of_a_broken_model_has_no_numbers_for_what_is_not_finite(result):
    broken = Perplexity(nll_nats=None, num_tokens=10, num_words=5, num_bytes=50)
    solves = dataclasses.replace(result.solves, max_residual=None, outcomes={"converged": 1, "non_finite": 3})
    report = render(dataclasses.replace(result, perplexity=broken, solves=solves))
    (line,) = (line for line in report.splitlines() if line.startswith("this model"))
    assert line.count("not finite") == 5
    assert "25.0 % of solves; the others: 3 non_finite" in report


def test_text_from_the_model_can_not_steer_the_terminal(result):
    hostile = "ok\x1b[2J\x07\u202edlrow\nline two\x9b \u2028 \U000e0041 end é 漢"
    assert printable(hostile) == r"ok\x1b[2J\x07\u202edlrow" + "\nline two" + r"\x9b \u2028 \U000e0041 end é 漢"
    sample = Sample("p\x1b", hostile + "\n" + "w" * 300)
    report = render(dataclasses.replace(result, sample=sample, location="runs/\x1b[2J"))
    assert all(character.isprintable() or character == "\n" for character in report)
    assert max(map(len, report.splitlines())) <= 100


def test_blank_lines_of_a_sample_are_merged_and_its_long_lines_broken(result):
    sample = Sample("", "\n one\n\n \n\ntwo\nthree " + "w" * 200)
    lines = render(dataclasses.replace(result, sample=sample)).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("sample"))
    assert lines[start + 1 : start + 5] == ["  |  one", "  |", "  | two", "  | three " + "w" * 90]
    assert "after" not in lines[start]


def test_a_sample_repeats_for_a_seed(corpus):
    model = make_model(len(corpus.tokenizer))
    before = torch.get_rng_state()
    samples = [sample_text(model, corpus.tokenizer, CONFIG, seed=seed) for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sample_goes_on_past_the_end_of_a_document(corpus):
    model = make_model(len(corpus.tokenizer))
    eos = corpus.tokenizer.eos_token_id
    model.generation_config.eos_token_id = eos

    def prefer_eos(_module, _inputs, output):
        output.logits[..., eos] = 1e9
        return output

    model.register_forward_hook(prefer_eos)
    sample = sample_text(model, corpus.tokenizer, CONFIG)
    assert sample.text == corpus.tokenizer.eos_token * CONFIG.sample_tokens


def test_a_sample_follows_the_model_at_low_temperature(corpus):
    model = make_model(len(corpus.tokenizer))
    cold = dataclasses.replace(CONFIG, sample_temperature=1e-4)
    made = sample_text(model, corpus.tokenizer, cold).text
    (prompt,) = encode_documents(corpus.tokenizer, ["The "])
    ids = torch.tensor([[corpus.tokenizer.eos_token_id, *prompt]])
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, model.eval()(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert made == corpus.tokenizer.decode(ids[0, 1 + len(prompt) :])


def test_uniform_text_is_worth_ln_v_to_the_unigram(corpus):
    vocab_size = len(corpus.tokenizer)
    tokens = np.concatenate([[0], np.arange(vocab_size)]).astype(np.uint16)
    uniform = Unigram.fit(tokens, vocab_size).nll_nats(tokens).sum()
    assert uniform == pytest.approx(vocab_size * math.log(vocab_size), rel=1e-12)
