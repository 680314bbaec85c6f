#!/usr/bin/env python3
"""Put the numbers of the committed results into README.md, where its comments say from which file."""

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
    from deq_lm.reporting.readme import with_numbers

    readme = ROOT / "README.md"
    try:
        text = with_numbers(readme.read_text("utf-8"), ROOT)
    except DataError as error:
        print(f"fill_readme: {error}", file=sys.stderr)
        return 2
    readme.write_text(text, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
