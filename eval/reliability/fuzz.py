#!/usr/bin/env python3
"""Try thousands of made-up recipes, overrides, texts, tokens, checkpoints and command lines; count them by target."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

EPILOG = """examples:
  python eval/reliability/fuzz.py
  python eval/reliability/fuzz.py --seed 1 --output fuzz.json

Runs the slow fuzz tests of tests/faults, which say what is made up and what has to come of it, and counts the inputs that
each has tried. Needs the packages of the extra `dev`.

exit codes: 0 every input was dealt with as it must be; 1 one was not; 2 a mistake in the call.
"""

ROOT = Path(__file__).resolve().parents[2]


def run_fuzz(seed: int) -> list[dict[str, str | int | bool]]:
    """Run the tests.

    Returns:
        Of each its name, how many inputs it tried, and whether all were dealt with as they must be.
    """
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder, "counts.jsonl")
        counts.touch()
        command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "slow", "-k", "fuzz", f"--hypothesis-seed={seed}"]
        subprocess.run(
            [*command, "tests/faults"], cwd=ROOT, env={**os.environ, "DEQ_LM_FUZZ_COUNTS": str(counts)}, check=False
        )
        return [json.loads(line) for line in counts.read_text("utf-8").splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="fuzz", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is made up; default: 0")
    parser.add_argument("--output", type=Path, help="JSON file to write; default: none")
    arguments = parser.parse_args()

    from deq_lm.errors import DataError, in_one_line
    from deq_lm.evaluation.records import Record, check_output, provenance, write_record

    @dataclass(frozen=True, kw_only=True)
    class FuzzResult(Record):
        kind: ClassVar[str] = "fuzz"
        seed: int
        inputs: int
        unclean: list[str]
        inputs_by_target: dict[str, int]

    if arguments.output is not None:
        try:
            check_output(arguments.output)
        except (DataError, OSError) as error:
            parser.error(in_one_line(str(error)))
    found = run_fuzz(arguments.seed)
    result = FuzzResult(
        **provenance(),
        seed=arguments.seed,
        inputs=sum(int(target["inputs"]) for target in found),
        unclean=[str(target["test"]) for target in found if not target["clean"]],
        inputs_by_target={str(target["test"]): int(target["inputs"]) for target in found},
    )
    if arguments.output is not None:
        write_record(arguments.output, result)
    print(f"{result.inputs:,} inputs for {len(found)} targets, of which unclean: {', '.join(result.unclean) or 'none'}")
    return 0 if found and not result.unclean else 1


if __name__ == "__main__":
    sys.exit(main())
