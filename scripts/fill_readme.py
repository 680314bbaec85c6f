#!/usr/bin/env python3
"""Put the numbers of the committed results into README.md, where its comments say from which file."""

from pathlib import Path

from deq_lm.reporting.readme import with_numbers

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_numbers(readme.read_text("utf-8"), ROOT), encoding="utf-8", newline="\n")
