"""Losses of documents: summed exactly however the text is dealt out, with intervals that cover, and paired."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from processes import launch
from scripts_of_eval import load

from deq_lm.data.documents import Documents
from deq_lm.data.encoding import EncodedSplit
from deq_lm.errors import DataError
from deq_lm.evaluation import (
    DocumentLosses,
    EvaluationConfig,
    EvaluationResult,
    evaluate_perplexity,
    paired_difference_of_documents,
    read_record,
    render,
    write_record,
)
from deq_lm.evaluation.bootstrap import ratio_interval
from deq_lm.evaluation.document_losses import sums_of_documents


def with_documents(split: EncodedSplit, lengths: list[int]) -> EncodedSplit:
    sizes = np.array(lengths, dtype=np.int64)
    documents = Documents(num_tokens=sizes, num_words=sizes // 2, num_bytes=3 * sizes, fingerprint="0" * 64)
    return replace(split, documents=documents)


LENGTHS = [40, 0, 1, 13, 30, 17]
"""Of documents: some longer than a stream or over the ends of segments and streams, one empty."""


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_each_document_has_the_nats_of_its_own_tokens(table_model, make_split, batch_size: int):
    model, split = table_model(), with_documents(make_split(101), LENGTHS)
    result = evaluate_perplexity(model, split, EvaluationConfig(batch_size=batch_size, segment_length=7))
    tokens = torch.from_numpy(split.tokens.astype(np.int64))
    nats = -model.table.log_softmax(-1)[tokens[:-1], tokens[1:]].detach().numpy()
    ends = np.cumsum(LENGTHS)
    expected = [nats[end - length : end].sum() for length, end in zip(LENGTHS, ends, strict=True)]
    assert result.document_nats == pytest.approx(expected, rel=1e-12)
    assert math.fsum(result.document_nats) == pytest.approx(result.perplexity.nll_nats, rel=1e-15)


def test_the_real_models_nats_of_each_target_are_those_of_its_loss(deq_model, make_split):
    for settings in ({}, {"embedding": {"name": "adaptive", "cutoffs": [5, 11], "div_val": 2}}):
        model = deq_model(dtype=torch.float32, **settings)
        tokens = torch.from_numpy(make_split(40).tokens.astype(np.int64))
        targets = tokens[1:].view(2, 20).clone()
        targets[0, 3:7] = -100
        with torch.no_grad():
            apart = model(tokens[:-1].view(2, 20), targets=targets, return_target_nats=True)
            together = model(tokens[:-1].view(2, 20), targets=targets)
        expected = -apart.logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
        torch.testing.assert_close(apart.target_nats, expected * (targets != -100), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(apart.nll_nats, together.nll_nats, rtol=1e-6, atol=0)
        assert together.target_nats is None


def test_part_of_a_split_has_no_documents(table_model, make_split):
    config = EvaluationConfig(batch_size=3, segment_length=8, max_segments=2)
    assert evaluate_perplexity(table_model(), with_documents(make_split(101), LENGTHS), config).document_nats == ()


def test_two_processes_have_the_sums_of_one_to_the_last_digit(table_model, make_split, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    model, split = table_model(), with_documents(make_split(101), LENGTHS)
    config = EvaluationConfig(batch_size=4, segment_length=7)
    expected = evaluate_perplexity(model, split, config)

    def compare():
        accelerator = Accelerator()
        found = evaluate_perplexity(model, split, config, accelerator)
        assert found.document_nats == expected.document_nats
        assert found.perplexity == expected.perplexity
        (tmp_path / str(accelerator.process_index)).touch()

    launch(compare)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def draw(generator: np.random.Generator, num_documents: int, correlation: float) -> tuple[np.ndarray, np.ndarray]:
    """Nats and words of documents of 50 to 500 words. A word has a mean of 7 nats and a standard deviation of 3, of which
    the share `correlation` of the variance is common to its document."""
    words = generator.integers(50, 501, size=num_documents)
    common = 3 * math.sqrt(correlation) * generator.standard_normal(num_documents)
    own = 3 * math.sqrt(1 - correlation) * generator.standard_normal(num_documents) / np.sqrt(words)
    return (7 + common + own) * words, words


@pytest.mark.parametrize(("num_documents", "correlation"), [(10, 0.05), (60, 0.05), (60, 0.0)])
def test_nineteen_intervals_of_twenty_cover_the_truth(num_documents: int, correlation: float):
    generator = np.random.default_rng(0)
    intervals = [ratio_interval(*draw(generator, num_documents, correlation)) for _ in range(200)]
    covered = sum(interval.low <= 7 <= interval.high for interval in intervals)
    assert 180 <= covered <= 199  # of 190 expected, +- 3


def test_of_means_of_normal_values_it_is_students_interval_on_either_side():
    below, above = [], []
    for seed in range(40):
        values = 7 + np.random.default_rng(seed).standard_normal(10)
        interval, expected = ratio_interval(values, np.ones(10)), 2.262 * values.std(ddof=1) / math.sqrt(10)
        below.append((values.mean() - interval.low) / expected)
        above.append((interval.high - values.mean()) / expected)
    assert statistics.fmean(below + above) == pytest.approx(1, abs=0.03)
    assert statistics.fmean(below) == pytest.approx(1, abs=0.05)
    assert statistics.fmean(above) == pytest.approx(1, abs=0.05)


def test_nats_are_summed_over_each_document_and_divided_by_what_is_asked_for():
    assert sums_of_documents(np.array([1.0, 2.0, 4.0, 8.0, 16.0]), np.array([2, 2, 3, 5])) == (3.0, 0.0, 4.0, 24.0)
    nats, words = draw(np.random.default_rng(5), 8, 0.1)
    several = losses(nats, words, num_tokens=tuple((2 * words).tolist()), num_bytes=tuple((5 * words).tolist()))
    per_word = several.interval("model", "num_words")
    for per, times in (("num_tokens", 2), ("num_bytes", 5)):
        found = several.interval("model", per)
        assert (times * found.low, times * found.high) == pytest.approx((per_word.low, per_word.high), rel=1e-12)


def test_words_that_depend_on_each_other_widen_the_interval():
    widths = []
    for correlation in (0.0, 0.05):
        interval = ratio_interval(*draw(np.random.default_rng(1), 60, correlation))
        widths.append(interval.high - interval.low)
    _, words = draw(np.random.default_rng(1), 60, 0.0)
    assert widths[0] == pytest.approx(2 * 1.96 * 3 / math.sqrt(words.sum()), rel=0.2)  # of independent words
    assert widths[1] > 2.5 * widths[0]


def test_an_interval_is_the_same_for_the_same_numbers_and_none_of_one_document_or_no_number():
    nats, words = draw(np.random.default_rng(2), 20, 0.1)
    assert ratio_interval(nats, words) == ratio_interval(nats, words) != ratio_interval(nats, words, seed=1)
    assert ratio_interval(nats[:1], words[:1]) is None
    assert ratio_interval(np.where(words == words[3], np.inf, nats), words) is None
    assert ratio_interval(nats, 0 * words) is None


def losses(nats: np.ndarray, words: np.ndarray, **fields) -> DocumentLosses:
    counts = tuple(words.tolist())
    facts = {"fingerprint": "0" * 64, "num_tokens": counts, "num_words": counts, "num_bytes": counts, **fields}
    return DocumentLosses(nll_nats={"model": tuple(nats.tolist())}, **facts)


def test_a_paired_difference_is_told_from_zero_where_the_two_intervals_overlap():
    nats, words = draw(np.random.default_rng(3), 60, 0.1)
    better = nats - 0.05 * words + np.random.default_rng(4).standard_normal(60)
    first, second = losses(better, words), losses(nats, words)
    found = paired_difference_of_documents(first, second)
    assert found.nats_per_word == pytest.approx((better.sum() - nats.sum()) / words.sum())
    assert found.is_evident
    assert found.interval.low < -0.05 + 0.005
    assert found.interval.high < -0.05 + 0.005
    own, other = (each.interval("model", "num_words") for each in (first, second))
    assert own.high > other.low
    assert found.interval.high - found.interval.low < 0.1 * (own.high - own.low)
    same = paired_difference_of_documents(first, first)
    assert (same.nats_per_word, same.is_evident) == (0.0, False)


def test_what_cannot_be_paired_is_refused():
    nats, words = draw(np.random.default_rng(3), 6, 0.1)
    mine = losses(nats, words)
    for other, message in (
        (None, "without the losses of its documents.*Measure again"),
        (losses(nats, words, fingerprint="1" * 64), "different texts.*6 documents with the SHA-256 0000.*with 1111"),
        (losses(nats[:5], words[:5]), "different texts"),
        (replace(mine, nll_nats={}), "not finite"),
    ):
        with pytest.raises(DataError, match=message):
            paired_difference_of_documents(mine, other)
    with pytest.raises(DataError, match="no words"):
        paired_difference_of_documents(losses(nats, 0 * words), losses(nats, 0 * words))


@pytest.fixture(scope="session")
def of_one_document(finished: Path) -> EvaluationResult:
    """A real result; its text is a single document."""
    return read_record(finished / "final" / "evaluation.json", EvaluationResult)


@pytest.fixture(scope="session")
def measured(of_one_document: EvaluationResult) -> EvaluationResult:
    """The same, as if its text were four documents, some easier than others."""

    def parts(total: int) -> tuple[int, ...]:
        ends = [total * tenths // 10 for tenths in (0, 1, 3, 6, 10)]
        return tuple(np.diff(ends).tolist())

    documents = of_one_document.documents
    shares = np.array([0.11, 0.18, 0.33, 0.38])
    apart = DocumentLosses(
        fingerprint=documents.fingerprint,
        num_tokens=parts(*documents.num_tokens),
        num_words=parts(*documents.num_words),
        num_bytes=parts(*documents.num_bytes),
        nll_nats={name: tuple((nats * shares).tolist()) for name, (nats,) in documents.nll_nats.items()},
    )
    return replace(of_one_document, documents=apart)


def test_a_finished_run_has_the_losses_of_its_documents(of_one_document: EvaluationResult):
    documents, perplexity = of_one_document.documents, of_one_document.perplexity
    assert documents.num_tokens == (perplexity.num_tokens,)
    assert documents.num_words == (perplexity.num_words,)
    assert documents.num_bytes == (perplexity.num_bytes,)
    losses = {"model": perplexity, "bigram": of_one_document.bigram, "unigram": of_one_document.unigram}
    for name, whole in losses.items():
        assert documents.nll_nats[name] == pytest.approx((whole.nll_nats,), rel=1e-12)


def test_every_perplexity_is_printed_with_its_interval(measured: EvaluationResult):
    documents = measured.documents
    for name, whole in (("model", measured.perplexity), ("bigram", measured.bigram), ("unigram", measured.unigram)):
        interval = documents.interval(name, "num_words")
        assert interval.low < whole.nats_per_word < interval.high
    text = render(measured)
    assert text.count("95 % from") == 3
    assert "bootstrap over the 4 documents" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("model")) <= 100
    lines = text.splitlines()
    (place,) = [i for i, line in enumerate(lines) if line.startswith("this model")]
    words, tokens = (documents.interval("model", per) for per in ("num_words", "num_tokens"))
    expected = [math.exp(words.low), math.exp(tokens.low), words.low, tokens.low]
    found = [float(cell.replace(",", "")) for cell in lines[place + 1].split()[3:]]
    assert found[:4] == pytest.approx(expected, rel=1e-4)


def test_a_single_document_says_that_there_is_no_interval_and_an_older_result_prints_none(
    of_one_document: EvaluationResult, measured: EvaluationResult
):
    assert "no intervals: the text is a single document" in render(of_one_document)
    assert "95 % from" not in render(of_one_document)
    assert "interval" not in render(replace(measured, documents=None))


def test_a_result_of_an_older_version_is_read(measured: EvaluationResult, tmp_path):
    write_record(tmp_path / "old.json", measured)
    mapping = json.loads((tmp_path / "old.json").read_text("utf-8"))
    del mapping["documents"]
    (tmp_path / "old.json").write_text(json.dumps(mapping), encoding="utf-8")
    assert read_record(tmp_path / "old.json", EvaluationResult) == replace(measured, documents=None)


def compare(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["compare.py", *map(str, arguments)])
    code = load("compare").main()
    return code, *capsys.readouterr()


def test_two_results_are_compared_by_document(measured: EvaluationResult, finished, tmp_path, monkeypatch, capsys):
    nats = {"model": tuple(0.99 * value for value in measured.documents.nll_nats["model"])}
    better = replace(
        measured,
        perplexity=replace(measured.perplexity, nll_nats=0.99 * measured.perplexity.nll_nats),
        documents=replace(measured.documents, nll_nats=nats),
        evaluation=replace(measured.evaluation, segment_length=9),
    )
    first, second, old = (tmp_path / name for name in ("first.json", "second.json", "old.json"))
    for place, result in ((first, better), (second, measured), (old, replace(measured, documents=None))):
        write_record(place, result)
    code, output, _ = compare(monkeypatch, capsys, first, second)
    assert code == 0
    assert f"{-0.01 * measured.perplexity.nats_per_word:+.4f} [-" in output
    assert "0 is outside" in output
    assert "CAUTION: segment length 9 and 8" in output
    code, output, _ = compare(monkeypatch, capsys, second, second)
    assert code == 0
    assert "+0.0000 [+0.0000, +0.0000]" in output
    assert "0 is inside" in output
    code, output, _ = compare(monkeypatch, capsys, finished, finished)
    assert code == 0
    assert "a single document says nothing of others: no intervals" in output
    assert "[" not in output.replace(str(finished), "")
    for others, message in ((old, "Measure again"), (finished, "different texts"), ("no\nfile", "no such file")):
        code, _, error = compare(monkeypatch, capsys, first, others)
        assert code == 2
        assert error.count("\n") == 1
        assert message in error
