#!/usr/bin/env python3
"""Compare two measured models document by document: the difference of nats per word, with its interval."""

import argparse
import sys
from pathlib import Path

EPILOG = """examples:
  python eval/compare.py runs/demo_cpu runs/demo_cpu_unrolled
  python eval/compare.py runs/demo_cpu/final/evaluation.json memory_256.json

A result is a file that eval/evaluate.py or eval/run.py wrote, or the folder of a finished run. The interval, of 95 %, is by
bootstrap over the documents that both were measured on, and so of other documents of their kind: it says nothing of other
seeds, which eval/report.py does where there are several. Both need the same text, but not the same tokenizer.

exit codes: 0 done; 2 a mistake in the call, or results that cannot be read or compared.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="eval/compare.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path, help="of one model")
    parser.add_argument("other", type=Path, help="of the model to compare it with")
    arguments = parser.parse_args()

    # torch and transformers take seconds to import, which --help and a mistyped option need not wait for
    from deq_lm.errors import ConfigError, DataError, in_one_line
    from deq_lm.evaluation import EvaluationResult, printable, read_record
    from deq_lm.evaluation.comparison import render_pair

    try:
        places = [
            place / "final" / "evaluation.json" if place.is_dir() else place for place in vars(arguments).values()
        ]
        results = [read_record(place, EvaluationResult) for place in places]
        print(render_pair(*results, names=[printable(str(place)) for place in vars(arguments).values()]))
    except (ConfigError, DataError, OSError) as error:
        print(f"eval/compare.py: {in_one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    sys.exit(main())
