"""Whatever arguments a script is given, it ends with one line of explanation and a documented code, and writes nothing."""

import io
import os
import re
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from fuzzing import fuzz, sizes
from hypothesis import strategies as st
from scripts_of_eval import load
from tiny_run import recipe_mapping

from deq_lm.errors import UnusedSettingWarning

ROOT = Path(__file__).resolve().parents[2]
WORK = {
    "scripts/count_parameters.py": (),
    "scripts/generate.py": ("deq_lm.evaluation.load_model",),
    "scripts/prepare_data.py": ("deq_lm.data.encoding.prepare_into",),
    "scripts/train_lm.py": ("deq_lm.training.train",),
    "eval/compare.py": ("deq_lm.evaluation.comparison.render_pair",),
    "eval/evaluate.py": ("deq_lm.evaluation.loading.load_model",),
    "eval/report.py": ("deq_lm.reporting.write_report", "deq_lm.reporting.write_markdown"),
    "eval/run.py": ("deq_lm.suites.run_suite",),
    "eval/benchmarks/adjoint_reuse.py": ("deq_lm.evaluation.loading.load_model",),
    "eval/benchmarks/generation.py": ("deq_lm.evaluation.loading.load_model",),
    "eval/benchmarks/monotone.py": ("run_all",),
    "eval/benchmarks/multiscale.py": ("run_all",),
    "eval/benchmarks/resolvent.py": ("run_all",),
    "eval/benchmarks/reversible.py": ("measure",),
    "eval/benchmarks/robustness.py": ("run_suite",),
    "eval/benchmarks/solvers.py": ("deq_lm.evaluation.loading.load_model",),
    "eval/benchmarks/starts.py": ("deq_lm.evaluation.loading.load_model",),
    "eval/benchmarks/training_step.py": ("deq_lm.evaluation.loading.load_model",),
    "eval/reliability/canary.py": ("make_model",),
    "eval/reliability/fuzz.py": ("run_fuzz",),
    "eval/reliability/kills.py": ("run_kills",),
    "eval/reliability/soak.py": ("deq_lm.data.encoding.prepare",),
}
"""Of each script, what a command that is in order begins: there it ends here, for it would take minutes or hours."""

OTHERS = {"scripts/fill_readme.py", "eval/lm_harness.py"}
"""Take no arguments, or those of another program."""


SECONDS = 10
"""After which a call counts as hanging."""


def give_up(*_: object) -> None:
    raise TimeoutError(f"no answer after {SECONDS} s")


class Begun(BaseException):
    """The command is in order."""


@dataclass
class Ended:
    """How a call ended: its code, or None for one that was in order."""

    code: int | None
    output: str
    error: str


class Script:
    """The main function of a script, which ends where its work would begin."""

    def __init__(self, place: str, patch: pytest.MonkeyPatch) -> None:
        def begin(*_: object, **__: object) -> None:
            raise Begun

        self.place = place
        patch.syspath_prepend(ROOT / place.rpartition("/")[0])
        module = load(place.removesuffix(".py"), ROOT)
        self._main = module.main
        for name in WORK[place]:
            patch.setattr(*((name, begin) if "." in name else (module, name, begin)))
        usage = self("--help")
        assert usage.code == 0
        self.prog = re.match(r"usage: (\S+)", usage.output)[1]
        codes = re.search(r"exit codes: (.*)", usage.output, re.DOTALL)
        assert codes is not None, f"{place} --help does not say how it exits"
        self.codes = {int(code) for code in re.findall(r"(?:^|; |, )(\d+)(?= )", codes[1])}
        self.options = sorted({*re.findall(r"(?<!\S)--[a-z-]+", usage.output)} - {"--help"})

    def __call__(self, *arguments: str) -> Ended:
        output, error = (
            io.TextIOWrapper(io.BytesIO(), "utf-8", errors, write_through=True)
            for errors in ("strict", "backslashreplace")
        )
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore", UnusedSettingWarning)
            patch.setattr(sys, "argv", [self.place, *arguments])
            patch.setattr(sys, "stdout", output)
            patch.setattr(sys, "stderr", error)
            former = signal.signal(signal.SIGALRM, give_up)
            signal.alarm(SECONDS)
            try:
                code = self._main()
            except SystemExit as end:
                code = end.code
            except Begun:
                code = None
            finally:
                signal.alarm(0)
                signal.signal(signal.SIGALRM, former)
        return Ended(code, *(stream.buffer.getvalue().decode() for stream in (output, error)))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to be in, with a recipe, text, and what is no recipe."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    mapping = recipe_mapping(tmp_path)
    (work / "recipe.yaml").write_text(yaml.safe_dump(mapping), encoding="utf-8")
    (work / "suite.yaml").write_text("name: tiny\nmodels: {a: {recipe: recipe.yaml}}\n", encoding="utf-8")
    (work / "damaged.json").write_text('{"kind": "evaluation", "schema_version": 3}', encoding="utf-8")
    (work / "binary").write_bytes(bytes(range(256)))
    (work / "empty").mkdir()
    run = work / "run"
    (run / "final").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "evaluation.json"):
        (run / "final" / name).write_text("{}", encoding="utf-8")
    (run / "recipe.yaml").write_text(yaml.safe_dump(mapping), encoding="utf-8")
    monkeypatch.setattr("deq_lm.data.corpora._hub_answers", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return work


GIVEN = [
    *("recipe.yaml", "suite.yaml", "damaged.json", "binary", "empty", "run", "run/final", "absent", "absent/inner"),
    *("binary/inner", ".", "..", "/", "", "-", "--", "=", "x" * 300, "x/" * 3000, "~", "a\nb.yaml", "*"),
    *("0", "1", "-1", "1e3", "1.5", "nan", "inf", "-inf", "9" * 30, "0x10", "true", "null"),
    *("text", "builtin", "wikitext-103", "prepared", "bpe", "word_level", "valid", "cpu", "cuda", "cuda:99", "meta"),
    *("training.max_steps=2", "training.max_step=2", "training.output_dir=absent", "training.output_dir=" + "x" * 300),
    *("evaluation.batch_size=0", "model=1", "model.cell.d_model=1.0e+30", "data.data_dir=" + "x" * 300, "a=binary"),
    *("evaluation.batch_size=", "data.cache_dir=binary", "name=" + "x" * 300, "seed=-1", "x\n=[", "tiny=run"),
    *("compare", "peak_memory", "perplexity", "equilibrium", "broyden", "float32"),
]


@pytest.mark.parametrize("name", sorted(WORK))
@sizes
def test_any_arguments_end_in_order_or_with_one_line_and_a_documented_code(place, monkeypatch, name, num_inputs):
    script = Script(name, monkeypatch)
    before = listing(place.parent)

    def check(arguments: list[str]) -> None:
        ended = script(*arguments)
        if ended.code is None or ended.code == 0:
            return
        assert ended.code in script.codes
        usage, _, message = ended.error.rpartition(f"{script.prog}: ")
        assert message.endswith("\n")
        echoed = sum(word.count("\n") for word in arguments) if message.startswith("error: ") else 0  # by argparse
        assert message.count("\n") <= 1 + echoed
        assert usage == "" or usage.startswith("usage: ")
        assert ended.output == ""
        assert listing(place.parent) == before

    options = script.options or ["--absent"]
    words = st.sampled_from(GIVEN) | st.sampled_from(options)
    values = [word for word in GIVEN if word != "--"]  # which after "=" Python 3.11 takes for an empty list
    words |= st.tuples(st.sampled_from(options), st.sampled_from(values)).map("=".join)
    words |= st.binary(max_size=12).map(lambda word: os.fsdecode(word.replace(b"\0", b"")))
    fuzz(check, st.lists(words, max_size=7), min(num_inputs, 400))


def listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def test_every_script_is_known_here():
    scripts = (path for folder in ("scripts", "eval") for path in (ROOT / folder).rglob("*.py"))
    found = {path.relative_to(ROOT).as_posix() for path in scripts if "__main__" in path.read_text("utf-8")}
    assert found == {*WORK, *OTHERS}
