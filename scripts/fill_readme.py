#!/usr/bin/env python3
"""Put the numbers of the committed results into README.md and eval/results/README.md, where comments name the files."""

import argparse
import sys
from pathlib import Path

EPILOG = """examples:
  python scripts/fill_readme.py

exit codes: 0 done; 2 a mistake in the call, or a result that cannot be read.
"""
ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="fill_readme", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()

    # torch and transformers take seconds to import, which --help and a mistyped option need not wait for
    from deq_lm.errors import DataError
    from deq_lm.reporting.readme import DOCUMENTS, with_numbers

    try:
        texts = {ROOT / name: with_numbers((ROOT / name).read_text("utf-8"), ROOT) for name in DOCUMENTS}
    except DataError as error:
        print(f"fill_readme: {error}", file=sys.stderr)
        return 2
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
