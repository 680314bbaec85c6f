#!/usr/bin/env python3
"""Train a language model as a recipe says."""

import argparse
import logging
import sys

EPILOG = """examples:
  accelerate launch scripts/train_lm.py recipes/demo_cpu.yaml
  accelerate launch scripts/train_lm.py recipes/demo_cpu.yaml training.max_steps=60 training.output_dir=runs/short
  accelerate launch scripts/train_lm.py recipes/demo_cpu.yaml --resume
  python scripts/train_lm.py recipes/demo_cpu.yaml --dry-run

Any setting of the recipe can be overridden by its dotted name. Everything a run writes goes to
training.output_dir, which must be new or empty, or be continued with --resume: from its newest complete
checkpoint, or from the start if there is none yet. --dry-run prints the parameters, and the memory and time
that a step would take, measured on a few streams of random tokens; it reads no text and writes nothing.

exit codes: 0 done; 2 a mistake in the call, the recipe, the data or the run folder; 3 a numerical fault
that ends the run, by training.faults or because no step in a row was without one; 4 out of memory;
130, 143 stopped by SIGINT, SIGTERM after saving a checkpoint.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="train_lm", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a YAML file, see recipes/README.md")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings to replace in the recipe")
    parser.add_argument("--resume", action="store_true", help="continue the run in training.output_dir")
    parser.add_argument("--dry-run", action="store_true", help="say what the run would take, and stop")
    arguments = parser.parse_intermixed_args()
    if arguments.resume and arguments.dry_run:
        parser.error("--dry-run with --resume: a dry run is of a run that is not begun; give one of the two")
    for stream in (sys.stdout, sys.stderr):  # generated text may hold what the terminal's encoding does not
        stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    logging.basicConfig(level=logging.WARNING, format="train_lm: %(message)s")

    # torch and transformers take seconds to import, which --help and a mistyped option need not wait for
    from accelerate import PartialState

    from deq_lm.errors import CheckpointError, ConfigError, DataError, SolveError, in_one_line
    from deq_lm.suites import dry_run
    from deq_lm.training import load_recipe, train
    from deq_lm.training.process import describe_out_of_memory, is_out_of_memory

    recipe = None
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        if arguments.dry_run:
            print(dry_run(recipe))
            return 0
        signal_number = train(recipe, resume=arguments.resume)
        # At the interpreter's end gloo's threads now and then find it gone, and abort a process whose work is done.
        PartialState().destroy_process_group()
    except (CheckpointError, ConfigError, DataError, FloatingPointError, OSError, SolveError) as error:
        print(f"train_lm: {in_one_line(str(error))}", file=sys.stderr)
        return 3 if isinstance(error, FloatingPointError | SolveError) else 2
    except (MemoryError, RuntimeError) as error:
        if recipe is None or not is_out_of_memory(error):
            raise
        print(f"train_lm: {describe_out_of_memory(recipe)}", file=sys.stderr)
        return 4
    return 0 if signal_number is None else 128 + signal_number


if __name__ == "__main__":
    sys.exit(main())
