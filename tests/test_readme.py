"""The README is executed: its Python blocks run, its files exist, its numbers are those of the committed result."""

import re
import shlex
from pathlib import Path

import pytest

from deq_lm.evaluation import EvaluationResult, read_record
from deq_lm.modeling import builders
from deq_lm.reporting import Measurements, read_measurements, read_published, write_markdown, write_report
from deq_lm.reporting.readme import DEMO, DOCUMENTS, TABLE, with_numbers
from deq_lm.training.strict_yaml import read_yaml

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
PLACES = [*DOCUMENTS, "eval/README.md", "eval/reliability/README.md", "recipes/README.md"]
every_document = pytest.mark.parametrize("document", PLACES)


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
def test_a_python_block_runs(code: str, monkeypatch):
    monkeypatch.setattr(builders, "CELLS", dict(builders.CELLS))  # a block may add to it
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_the_files_it_names_exist():
    names = re.findall(r"`([\w/.]+\.(?:py|yaml|txt|json))`", README)
    folder = ROOT
    assert len(names) > 10
    for name in names:
        path = ROOT / name if "/" in name or name == "constraints.txt" else folder / name
        folder = path.parent if "/" in name else folder
        assert path.exists() or list(ROOT.glob(f"deq_lm/*/{name}")) or name in ("metrics.jsonl",), name


@every_document
def test_the_modules_that_a_document_names_exist(document: str):
    names = re.findall(r"`(deq_lm(?:[/.]\w+)+?)(?:\.py)?`", (ROOT / document).read_text("utf-8"))
    for name in names:
        path = ROOT / name.replace(".", "/")
        # a module, a package, a name in a module
        places = [path.with_suffix(".py"), path, path.parent.with_suffix(".py")]
        assert any(place.exists() for place in places), name


@every_document
def test_the_commands_it_gives_name_files_recipes_and_targets_that_exist(document: str):
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for language, code in re.findall(r"```(\w+)\n(.*?)```", (ROOT / document).read_text("utf-8"), flags=re.DOTALL):
        for line in code.replace("\\\n", " ").splitlines() if language == "bash" else ():
            words = shlex.split(line, comments=True)
            if words[0] == "make":
                assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), line
            for word in words:
                if word.startswith(("scripts/", "eval/", "recipes/")):
                    assert (ROOT / word).exists(), line


def test_the_layers_it_draws_are_those_that_are_checked():
    (drawn,) = [code for language, code in BLOCKS if language == "text" and code.startswith("scripts, eval")]
    checked = re.search(r"^layers = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert checked is not None
    assert drawn.splitlines()[1:] == re.findall(r'"(.+?)"', checked[1])


def test_the_numbers_are_those_of_the_committed_results():
    texts = [(ROOT / name).read_text("utf-8") for name in DOCUMENTS]
    assert [with_numbers(text, ROOT) for text in texts] == texts
    files = {found[0] for text in texts for found in TABLE.findall(text) + DEMO.findall(text)}
    assert {f"eval/results/{name}.json" for name in ("solvers", "training_step", "robustness", "demo_cpu")} <= files


@every_document
def test_the_links_lead_to_files_and_headings_that_exist(document: str):
    links = re.findall(r"\]\(([^)#]*)(#[^)]+)?\)", (ROOT / document).read_text("utf-8"))
    for place, heading in links:
        if not place.startswith("http"):
            path = (ROOT / document).parent / place
            assert path.exists(), place
            text = (path / "README.md" if path.is_dir() else path).read_text("utf-8") if heading else ""
            titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
            anchors = {"#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert not heading or heading in anchors, place + heading


def test_a_number_that_was_typed_is_replaced():
    _, _, table = TABLE.findall(README)[0]
    number = re.findall(r"\d+\.\d+", table)[0]
    typed = README.replace(table, table.replace(number, "0.123", 1))
    assert typed != README
    assert with_numbers(typed, ROOT) == README


def test_the_demo_says_whether_it_beats_the_bigram():
    (place,) = re.findall(r"<!-- demo: (\S+) -->", README)
    result = read_record(ROOT / place, EvaluationResult)
    loses = result.perplexity.nats_per_token > result.bigram.nats_per_token
    assert loses == ("the model loses to\nthe bigram" in README)


def test_the_committed_report_is_of_the_committed_results(tmp_path):
    """As `make report` makes it; plots aside, which another version of matplotlib may draw otherwise."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    lists = dict(re.findall(r"^([A-Z]+) := (eval/results.+)$", makefile, flags=re.MULTILINE))
    titles = dict(re.findall(r'--(?:output|markdown) (\S+) --title "(.+)"', makefile))

    def measured(name: str) -> Measurements:
        return read_measurements([path for place in lists[name].split() for path in sorted(ROOT.glob(place))])

    published = read_published(ROOT / "eval/reference/published.yaml")
    folders = {"COMPARED": "eval/report"} | {
        name: f"eval/report/{name.lower()}" for name in ("SCALING", "DEPTH", "GPU")
    }
    for name, folder in folders.items():
        made = tmp_path / name
        write_report(measured(name), published, made, title=titles[folder])
        for file in ("report.md", "tables.json"):
            assert (made / file).read_text("utf-8") == (ROOT / folder / file).read_text("utf-8"), f"{folder}/{file}"
        assert {path.name for path in made.glob("*.svg")} == {path.name for path in (ROOT / folder).glob("*.svg")}
    ablations = read_measurements([ROOT / "eval/results/ablations"])
    notes = read_yaml(ROOT / "eval/results/ablations/notes.yaml")
    write_markdown(ablations, tmp_path / "ABLATIONS.md", title=titles["eval/results/ABLATIONS.md"], notes=notes)
    write_markdown(measured("CELLS"), tmp_path / "CELLS.md", title=titles["eval/results/CELLS.md"])
    for name in ("ABLATIONS.md", "CELLS.md"):
        assert (tmp_path / name).read_text("utf-8") == (ROOT / "eval" / "results" / name).read_text("utf-8"), name
