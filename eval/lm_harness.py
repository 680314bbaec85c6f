#!/usr/bin/env python3
"""Run lm-evaluation-harness with the models of this project known to it: its own command line, after `import deq_lm`."""

import argparse
import sys
from importlib.util import find_spec

EPILOG = """examples:
  python eval/lm_harness.py --model hf --model_args pretrained=runs/demo_cpu/final --tasks hellaswag --limit 100
  python eval/lm_harness.py --model hf --model_args pretrained=runs/demo_cpu/final --include_path eval/tasks \\
      --tasks deq_lm_text --metadata '{"text": "my_text.txt"}'
  python eval/lm_harness.py run --help

All arguments are those of the command lm_eval, which `pip install -e '.[lm-eval]'` installs. Loading needs no
trust_remote_code. The length of a window is the n_ctx of the model's config.json (segment and memory in training) unless
model_args has max_length=LENGTH.

The task deq_lm_text gives the perplexity of a text file; eval/README.md says when it is that of eval/evaluate.py.

exit codes: 0 done; 2 a mistake in the call, the model folder or the text; 1 lm_eval failed.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="eval/lm_harness.py",
        usage="%(prog)s [-h] [what lm_eval takes ...]",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        parser.parse_args(sys.argv[1:] or ["--help"])
    if find_spec("lm_eval") is None:
        print("eval/lm_harness.py: lm_eval is not installed: pip install -e '.[lm-eval]'", file=sys.stderr)
        return 2

    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports] - not a dependency

    import deq_lm  # noqa: F401 - makes its models known to AutoModelForCausalLM
    from deq_lm.errors import CheckpointError, ConfigError, DataError

    try:
        cli_evaluate()
    except (CheckpointError, ConfigError, DataError) as error:
        print(f"eval/lm_harness.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
