#!/usr/bin/env python3
"""Make a report of measured models: a page of HTML, the same in Markdown, plots and tables."""

import argparse
import sys
from pathlib import Path

EPILOG = """examples:
  python eval/report.py results/compare
  python eval/report.py runs/demo_cpu runs/demo_cpu_unrolled runs/demo_cpu_untied --output reports/demo
  python eval/report.py eval/results/compare_wikipedia --output eval/report --title "Equilibrium and rivals"

A result is a file or a folder that eval/run.py wrote, or the folder of a finished run. Runs of one model with different
seeds become one row, with the 95 % interval of their mean; the lowest loss is marked only if the intervals say so. What was
not measured is left out, and named. Losses that were not measured alike are refused. The table of losses is printed, too.

exit codes: 0 done; 2 a mistake in the call, or results that cannot be read or compared.
"""
PUBLISHED = Path(__file__).resolve().parent / "reference" / "published.yaml"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="eval/report.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="result", help="a result file, a folder of them, or a run"
    )
    parser.add_argument("--output", type=Path, help="folder to write index.html, report.md, tables.json and plots to")
    parser.add_argument("--markdown", type=Path, help="Markdown file to write, without plots")
    parser.add_argument("--notes", type=Path, help="YAML file of model: sentence; also shows in what the models differ")
    parser.add_argument("--title", default="Deep equilibrium language models", help="of the page")
    arguments = parser.parse_args()

    # torch and transformers take seconds to import, which --help and a mistyped option need not wait for
    from deq_lm.errors import ConfigError, DataError, in_one_line
    from deq_lm.evaluation.tables import markdown_table
    from deq_lm.training.strict_yaml import read_yaml

    try:
        from deq_lm.reporting import headline_rows, read_measurements, read_published, write_markdown, write_report
    except ModuleNotFoundError as error:
        print(f"eval/report.py: {error}. Install what it draws with: pip install -e '.[report]'", file=sys.stderr)
        return 2
    try:
        measurements = read_measurements(arguments.results)
        for text, results in measurements.texts().items():
            print(f"{text}\n\n{markdown_table(headline_rows(measurements, results))}\n")
        notes = None if arguments.notes is None else read_yaml(arguments.notes)
        if arguments.markdown is not None:
            write_markdown(measurements, arguments.markdown, title=arguments.title, notes=notes)
            print(f"written: {arguments.markdown}")
        if arguments.output is not None:
            published = read_published(PUBLISHED)
            write_report(measurements, published, arguments.output, title=arguments.title, notes=notes)
            print(f"written: {arguments.output / 'index.html'}")
    except (ConfigError, DataError, OSError) as error:
        print(f"eval/report.py: {in_one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
