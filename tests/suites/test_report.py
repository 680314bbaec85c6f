"""The report: of all measurements or of some, self-contained, the same for the same input, and refusing what is damaged."""

from __future__ import annotations

import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deq_lm.errors import ConfigError, DataError
from deq_lm.evaluation import DocumentLosses, EvaluationResult, read_record, write_record
from deq_lm.reporting import headline_rows, read_measurements, read_published, write_report
from deq_lm.reporting.learning import device_memory_rows, training_rows, validation_rows
from deq_lm.reporting.measurements import Measurements
from deq_lm.suites.config import ConvergenceSettings, CostSettings, MemorySettings
from deq_lm.suites.convergence import measure_convergence
from deq_lm.suites.cost import measure_cost
from deq_lm.suites.learning import ValidationPoint, read_learning
from deq_lm.suites.memory import measure_memory

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
PUBLISHED = ROOT / "eval" / "reference" / "published.yaml"
FILES = ("index.html", "report.md", "tables.json")


@pytest.fixture(scope="module")
def results(subjects, tmp_path_factory) -> Path:
    """A folder with a measurement of every kind; not to be changed."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        convergence = ConvergenceSettings(num_evaluations=(1, 4, 8), num_segments=2)
        records = {
            "memory": measure_memory("tiny", subjects, MemorySettings(num_evaluations=(2, 4)), CPU),
            "cost": measure_cost("tiny", subjects, CostSettings(rounds=1), CPU),
            "convergence": measure_convergence("tiny", subjects[0], convergence, CPU),
            **{f"learning_{subject.name}": read_learning("tiny", subject) for subject in subjects},
        }
    for name, record in records.items():
        write_record(folder / f"{name}.json", record)
    for subject in subjects:
        result = read_record(subject.run.final / "evaluation.json", EvaluationResult)
        write_record(folder / f"evaluation_{subject.name}.json", result)
    return folder


def page(output: Path) -> str:
    return (output / "index.html").read_text("utf-8")


def test_a_report_of_everything_has_every_section_and_plot(results, tmp_path):
    sections = write_report(read_measurements([results]), read_published(PUBLISHED), tmp_path, title="All of it")
    titles = [section.title for section in sections]
    assert titles[0] == "Models side by side"
    assert "Not measured" not in titles
    names = {plot.name for section in sections for plot in section.plots}
    assert len(names) == 8
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, *(f"{name}.svg" for name in names)}
    markdown = (tmp_path / "report.md").read_text("utf-8")
    for title in titles:
        assert f"<h2>{title}</h2>" in page(tmp_path)
        assert f"## {title}" in markdown


def test_validation_losses_are_by_tokens_and_the_mean_of_runs_that_have_got_so_far(subjects):
    result = read_learning("tiny", subjects[0])
    per_step = result.recipe["training"]["batch_size"] * result.recipe["training"]["segment_length"]
    runs = [
        replace(
            result,
            model=name,
            validation=tuple(ValidationPoint(step=step, nats_per_token=loss) for step, loss in points),
        )
        for name, points in [
            ("long", [(1_000, 5.0), (2_000, 4.0)]),
            ("long", [(1_000, 6.0), (2_000, None)]),
            ("short", [(1_000, 5.25)]),
        ]
    ]
    first, last = (f"{steps * per_step / 1e6:.3g} M" for steps in (1_000, 2_000))
    assert validation_rows(runs) == [
        {"model": "long", first: "5.500", last: "-"},
        {"model": "short", first: "5.250", last: "-"},
    ]
    many = replace(result, validation=tuple(ValidationPoint(step=1_000 * k, nats_per_token=1.0) for k in range(1, 20)))
    (row,) = validation_rows([many])
    assert list(row)[1:] == [f"{1_000 * k * per_step / 1e6:.3g} M" for k in (1, 4, 7, 10, 13, 16, 19)]
    assert validation_rows([replace(result, validation=())]) == []


def test_training_losses_are_those_logged_last_before_so_many_tokens(subjects):
    result = read_learning("tiny", subjects[0])
    points = [(1_000_000, 5.0), (2_000_000, 4.0), (3_000_000, 3.5)]
    whole = replace(
        result,
        training=tuple(replace(result.training[0], num_tokens=tokens, nats_per_token=nats) for tokens, nats in points),
    )
    ended = replace(whole, model="ended", training=whole.training[:2])
    assert training_rows([whole, ended]) == [
        {"model": result.model, "1 M": "5.000", "2 M": "4.000", "3 M": "3.500"},
        {"model": "ended", "1 M": "5.000", "2 M": "4.000", "3 M": "-"},
    ]


def test_the_memory_of_a_gpu_is_the_most_of_all_runs_and_steps_and_missing_without_one(subjects):
    result = read_learning("tiny", subjects[0])
    assert device_memory_rows([result]) == []
    allocated = [(1_500_000_000, 2_000_000_000), (1_000_000_000, 500_000_000)]
    runs = [
        replace(
            result, model=name, training=tuple(replace(result.training[0], device_peak_bytes=peak) for peak in peaks)
        )
        for name, peaks in zip(["a", "b"], allocated, strict=True)
    ]
    assert [row["allocated"] for row in device_memory_rows([*runs, runs[0]])] == ["2.0 GB (1.00x)", "1.0 GB (0.50x)"]


def test_models_of_one_size_and_several_budgets_of_tokens_are_shown_by_scale(results, tmp_path):
    first = read_record(results / "evaluation_unrolled.json", EvaluationResult)
    settings = first.recipe["training"]
    longer = {**first.recipe, "name": "longer", "training": {**settings, "max_steps": 2 * settings["max_steps"]}}
    perplexity = replace(first.perplexity, nll_nats=0.5 * first.perplexity.nll_nats)
    longer = replace(first, recipe=longer, perplexity=perplexity)
    write_record(tmp_path / "longer_0.json", longer)
    write_record(tmp_path / "longer_1.json", replace(longer, seed=longer.seed + 1))
    places = [results / "evaluation_unrolled.json", results / "cost.json", *sorted(tmp_path.glob("longer_*"))]
    sections = write_report(read_measurements(places), None, tmp_path / "report", title="By scale")
    (scale,) = [section for section in sections if section.title == "Scale"]
    losses, operations = (table.rows for table in scale.tables)
    (tokens, twice) = list(losses[0])[2:]
    nats = first.perplexity.nats_per_token
    assert len(losses) == 1
    assert losses[0] | {tokens: f"{nats:.3f}", twice: f"{nats / 2:.3f} +- 0.000"} == losses[0]
    assert operations[0][twice] == "-"  # a name that the costs do not have
    assert "loss_against_scale" in [plot.name for plot in scale.plots]


def test_the_headline_has_the_measured_numbers(results):
    measurements = read_measurements([results])
    ((text, evaluations),) = measurements.texts().items()
    assert text == "text, test split"
    rows = {row["model"]: row for row in headline_rows(measurements, evaluations)}
    assert set(rows) == {"equilibrium", "unrolled"}
    for result in evaluations:
        row = rows[result.recipe["name"]]
        assert row["nats per token"] == f"{result.perplexity.nats_per_token:.3f}"
        assert row["perplexity per word"] == f"{result.perplexity.word_perplexity:,.1f}"
    kept = json.loads((results / "memory.json").read_text("utf-8"))["rows"]
    (own,) = [row["most_activations"] for row in kept if row["num_evaluations"] == 4 and row["regularized"]]
    (first,) = [row["most_activations"] for row in kept if row["num_evaluations"] == 4 and row["model"] == "unrolled"]
    assert kept[0]["model"] == "equilibrium"  # what others are compared with
    assert rows["equilibrium"]["activations"] == f"{own / 1e6:,.1f} MB (1.00x)"
    assert rows["unrolled"]["activations"] == f"{first / 1e6:,.1f} MB ({first / own:.2f}x)"  # 3 layers: 4 is the next


def test_a_single_run_has_its_interval_over_documents_and_several_runs_theirs_over_seeds(results):
    single = read_record(results / "evaluation_equilibrium.json", EvaluationResult)
    tokens, nats = (100, 300, 200), (450.0, 1500.0, 800.0)
    documents = DocumentLosses(
        fingerprint="0" * 64, num_tokens=tokens, num_words=(7, 8, 9), num_bytes=(9, 8, 7), nll_nats={"model": nats}
    )
    single = replace(single, documents=documents)
    interval = documents.interval("model", "num_tokens")
    assert interval.high - interval.low > 0.1
    several = [single, replace(single, seed=single.seed + 1)]
    for runs, expected in (
        ([single], f" (documents: {interval.low:.3f} to {interval.high:.3f})"),
        (several, " +- 0.000"),
        ([replace(single, documents=None)], ""),
    ):
        (row,) = headline_rows(Measurements(tuple((Path(), run) for run in runs)), runs)
        assert row["nats per token"] == f"{single.perplexity.nats_per_token:.3f}{expected}"


def test_the_page_needs_nothing_but_itself(results, tmp_path):
    write_report(read_measurements([results]), read_published(PUBLISHED), tmp_path, title="<b>&")
    html = page(tmp_path)
    assert "<title>&lt;b&gt;&amp;</title>" in html
    assert not re.search(r"<script|<link|<iframe|<img|@import|\bsrc=", html)
    assert not re.search(r"url\((?!#)", html)
    addresses = set(re.findall(r'\b(?:href|action|xlink:href)="([^"]*)"', html))
    assert all(address.startswith(("#", "data:image/png;")) for address in addresses)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))  # plots do not take each other's clip paths
    assert {address[1:] for address in addresses if address.startswith("#")} <= set(ids)
    assert "#123456" not in html


def test_the_same_measurements_give_the_same_bytes(results, tmp_path):
    for name in ("first", "second"):
        write_report(read_measurements([results]), read_published(PUBLISHED), tmp_path / name, title="Twice")
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def test_convergence_is_told_by_budget_and_the_gradient_by_its_error(results, tmp_path):
    write_report(read_measurements([results]), None, tmp_path, title="All of it")
    tables = json.loads((tmp_path / "tables.json").read_text("utf-8"))["tables"]
    record = json.loads((results / "convergence.json").read_text("utf-8"))
    (losses,) = tables["nats per token after so many evaluations"]
    own = [point for point in record["budgets"] if point["solver"] == "Broyden (prefix)"]
    assert losses == {"model": "equilibrium", "seed": "1"} | {
        str(point["num_evaluations"]): f"{point['nats_per_token']:.5f}" for point in own
    }
    (row,) = tables["error of the gradient"]
    (error,) = record["gradients"]
    assert (row["gradient"], row["relative error"]) == ("as in training", f"{error['relative_error']:.2%}")
    assert row["cosine"] == f"{error['cosine']:.4f}"


@pytest.mark.parametrize("kind", ["memory", "cost", "convergence", "evaluation_unrolled", "learning_equilibrium"])
def test_a_report_of_one_measurement_says_what_is_missing(results, tmp_path, kind: str):
    sections = write_report(read_measurements([results / f"{kind}.json"]), None, tmp_path, title="Part")
    (missing,) = [section for section in sections if section.title == "Not measured"]
    assert len(missing.text) == (4 if kind.startswith("learning") else 3)
    assert all("python eval/run.py" in text for text in missing.text)
    assert "Where the numbers come from" in page(tmp_path)


def test_notes_stand_beside_what_differs(results, tmp_path):
    recipe = read_record(results / "evaluation_unrolled.json", EvaluationResult)
    other = {**recipe.recipe, "name": "faster", "training": {**recipe.recipe["training"], "clip_norm": 2.0}}
    write_record(tmp_path / "faster.json", replace(recipe, recipe=other))
    measurements = read_measurements([results / "evaluation_unrolled.json", tmp_path / "faster.json"])
    write_report(
        measurements, None, tmp_path, title="Ablations", notes={"unrolled": "The start.", "faster": "No <harm>."}
    )
    tables = json.loads((tmp_path / "tables.json").read_text("utf-8"))["tables"]
    rows = {row["model"]: row for row in tables["differences from unrolled"]}
    assert rows["faster"]["differs in"] == "training.clip_norm: 1.0 there, 2.0 here"
    assert rows["faster"]["what it taught"] == "No <harm>."
    assert "No &lt;harm&gt;." in page(tmp_path)


def test_a_leak_is_shouted(results, tmp_path):
    result = read_record(results / "evaluation_unrolled.json", EvaluationResult)
    leaking = replace(result, causality=replace(result.causality, max_change_nats=1.0))
    write_record(tmp_path / "leaking.json", leaking)
    measurements = read_measurements([tmp_path / "leaking.json"])
    assert [row["causal"] for row in headline_rows(measurements, measurements.of(EvaluationResult))] == ["NO"]


def test_out_of_memory_is_a_row_and_no_point(results, tmp_path):
    content = json.loads((results / "memory.json").read_text("utf-8"))
    for row in content["rows"]:
        if row["num_evaluations"] == 4 and row["model"] == "unrolled":
            row |= {"at_peak": None, "largest": None, "most_activations": None, "most_solver": None}
    (tmp_path / "memory.json").write_text(json.dumps(content), encoding="utf-8")
    write_report(read_measurements([tmp_path / "memory.json"]), None, tmp_path, title="Full")
    assert "out of memory" in page(tmp_path)


def test_other_text_is_another_table_and_another_protocol_is_refused(results, tmp_path):
    result = read_record(results / "evaluation_unrolled.json", EvaluationResult)
    write_record(tmp_path / "other_text.json", replace(result, data_fingerprint="other"))
    both = read_measurements([results / "evaluation_equilibrium.json", tmp_path / "other_text.json"])
    assert list(both.texts()) == ["text, test split", "text, test split (other)"]
    shorter = replace(result, evaluation=replace(result.evaluation, segment_length=4))
    write_record(tmp_path / "shorter.json", shorter)
    mixed = read_measurements([results / "evaluation_equilibrium.json", tmp_path / "shorter.json"])
    with pytest.raises(DataError, match="cannot be compared: segment length 4"):
        write_report(mixed, None, tmp_path / "report", title="Mixed")
    assert not (tmp_path / "report").exists()


def test_a_damaged_file_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no \.json file in it"):
        read_measurements([tmp_path])
    (tmp_path / "memory.json").write_text('{"kind": "memory", "schema_version": 3}', encoding="utf-8")
    with pytest.raises(DataError, match="damaged: memory: missing created"):
        read_measurements([tmp_path])
    (tmp_path / "memory.json").write_text('{"kind": "memories", "schema_version": 3}', encoding="utf-8")
    with pytest.raises(DataError, match="of kind 'memories'; expected evaluation or learning"):
        read_measurements([tmp_path])


def test_published_numbers_have_sources_and_recipes_that_exist(tmp_path):
    published = read_published(PUBLISHED)
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert {model.recipe for model in published.models if model.recipe} <= recipes
    assert len({model.model for model in published.models}) == len(published.models)
    (tmp_path / "published.yaml").write_text(
        "sources: {}\nmodels: [{model: a, depth: stack, parameters_m: 1, perplexity: 2.0, source: b}]", encoding="utf-8"
    )
    with pytest.raises(ConfigError, match="'a' has the source 'b'"):
        read_published(tmp_path / "published.yaml")


def test_markdown_alone_has_the_tables_and_names_no_plot(results, monkeypatch, tmp_path, capsys):
    (tmp_path / "notes.yaml").write_text("unrolled: Where it began.", encoding="utf-8")
    arguments = [results, "--markdown", tmp_path / "A.md", "--notes", tmp_path / "notes.yaml"]
    assert call(monkeypatch, *arguments) == 0
    text = (tmp_path / "A.md").read_text("utf-8")
    assert "Where it began." in text
    assert "## Cost" in text
    assert ".svg" not in text


def call(monkeypatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "eval" / "report.py"), run_name="__main__")
    return caught.value.code


def test_the_script_prints_the_table_and_writes_the_page(monkeypatch, subjects, results, tmp_path, capsys):
    places = [subjects[0].run.path, results / "evaluation_unrolled.json"]
    assert call(monkeypatch, *places, "--output", tmp_path, "--title", "Both") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "text, test split"
    assert {line.split("|")[1].strip() for line in lines[4:6]} == {"equilibrium", "unrolled"}
    assert "<h1>Both</h1>" in page(tmp_path)


def test_the_script_fails_in_one_line(monkeypatch, tmp_path, capsys):
    assert call(monkeypatch, tmp_path / "none.json") == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "old.json").write_text('{"schema_version": 0}')
    assert call(monkeypatch, tmp_path / "old.json") == 2
    error = capsys.readouterr().err
    assert "this deq_lm reads version" in error
    assert error.count("\n") == 1
