#!/usr/bin/env python3
"""Run a suite: train what is missing, and measure several models alike: perplexity, memory, cost, convergence."""

import argparse
import logging
import sys
from pathlib import Path

SUITES = Path(__file__).resolve().parent / "suites"
EPILOG = f"""suites in eval/suites: {", ".join(sorted(path.stem for path in SUITES.glob("*.yaml")))}

examples:
  python eval/run.py peak_memory
  python eval/run.py perplexity --models runs/demo_cpu runs/demo_cpu_untied
  python eval/run.py compare --seeds 0 --output results/quick training.max_steps=300
  python eval/run.py compare --models equilibrium unrolled
  python eval/run.py perplexity --models wide=runs/mine data.corpus=text data.data_dir=FOLDER

Each measurement is a JSON file in the output folder, of which eval/report.py makes a report. A model of a recipe is trained
if the suite says so, one process a run; a finished run is not trained again, an interrupted one goes on.

exit codes: 0 done; 2 a mistake in the call, a suite, a recipe, a run or the text.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="eval/run.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", help="one of eval/suites, or a YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings to replace in all recipes; what a model of the suite sets for itself stays",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="some of the suite's, by name; or recipes or run folders in place of them, as PATH or NAME=PATH",
    )
    parser.add_argument("--seeds", nargs="+", default=[], metavar="SEED", help="whole numbers, instead of the suite's")
    parser.add_argument("--train", action="store_true", help="train missing models, also where the suite does not")
    parser.add_argument("--runs", type=Path, help="where runs are looked for and trained; default: runs/SUITE")
    parser.add_argument("--output", type=Path, help="folder to write to; default: results/SUITE")
    arguments = parser.parse_intermixed_args()
    # `eval/run.py compare --seeds 0 1 training.max_steps=9`: the last one is no seed, and after --models no model
    overrides = [*arguments.overrides, *filter(_is_override, [*arguments.models, *arguments.seeds])]
    models, seeds = ([text for text in texts if text not in overrides] for texts in (arguments.models, arguments.seeds))
    if wrong := [seed for seed in seeds if not seed.isdecimal()]:
        parser.error(f"--seeds {' '.join(wrong)}: expected whole numbers of 0 or more")
    logging.basicConfig(level=logging.WARNING, format="eval/run.py: %(message)s")

    # torch and transformers take seconds to import, which --help and a mistyped option need not wait for
    from dataclasses import replace

    from deq_lm.errors import CheckpointError, ConfigError, DataError, in_one_line
    from deq_lm.suites import load_suite, run_suite, subjects_of

    path = Path(arguments.suite)
    try:
        suite = load_suite(path if path.suffix == ".yaml" else SUITES / f"{path}.yaml")
        subjects = subjects_of(
            suite,
            models=models,
            seeds=list(map(int, seeds)),
            overrides=overrides,
            runs=arguments.runs or Path("runs") / suite.name,
        )
        suite = replace(suite, train=suite.train or arguments.train)
        run_suite(suite, subjects, arguments.output or Path("results") / suite.name)
    except (CheckpointError, ConfigError, DataError, OSError) as error:
        print(f"eval/run.py: {in_one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


def _is_override(text: str) -> bool:
    """Whether it is section.key=value and not NAME=PATH."""
    name, equals, _ = text.partition("=")
    return bool(equals) and name.partition(".")[0] in ("name", "seed", "data", "model", "training", "evaluation")


if __name__ == "__main__":
    sys.exit(main())
