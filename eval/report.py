#!/usr/bin/env python3
"""Compare measured models: one table of their parameters, losses and solves, as Markdown and, if asked, JSON."""

import argparse
import sys
from pathlib import Path

EPILOG = """examples:
  python eval/report.py runs/demo_cpu runs/demo_cpu_unrolled runs/demo_cpu_untied
  python eval/report.py runs/*/final/evaluation.json --output eval/results/rivals_demo_cpu.json

A result is a file that eval/run.py or the end of a training run wrote, or the folder of the run. Those of one recipe with
different seeds become one row, with the 95 % interval of their mean; the lowest loss is marked only if the intervals say
so. Results that were not measured alike are refused.

exit codes: 0 done; 2 a mistake in the call, or results that cannot be read or compared.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="eval/report.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="result", help="a result file or a run folder")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()

    # torch and transformers take seconds to import, which --help and a mistyped option need not wait for
    from deq_lm.errors import ConfigError, DataError
    from deq_lm.evaluation import compare, comparison_table, read_result
    from deq_lm.evaluation.tables import markdown_table, write_json

    try:
        files = [path / "final" / "evaluation.json" if path.is_dir() else path for path in arguments.results]
        results = [read_result(path) for path in files]
        table = comparison_table(compare(results))
        split = f"{results[0].split} split"
        print(markdown_table(table))
        if arguments.output is not None:
            sources = [
                {"location": r.location, "seed": r.seed, "created": r.created, "commit": r.environment["commit"]}
                for r in results
            ]
            write_json(arguments.output, {"sources": sources, "tables": {split: table}})
    except (ConfigError, DataError) as error:
        print(f"eval/report.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
