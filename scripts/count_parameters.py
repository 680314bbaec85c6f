#!/usr/bin/env python3
"""Count the parameters of recipes' models, in the embedding and besides, and find the untied stack that has as many."""

import argparse
import sys

EPILOG = """examples:
  python scripts/count_parameters.py recipes/demo_cpu.yaml recipes/benchmark_cell.yaml
  python scripts/count_parameters.py recipes/demo_cpu.yaml --stack 2
  python scripts/count_parameters.py recipes/demo_cpu.yaml --vocab-size 267735

The vocabulary is the recipe's data.vocab_size unless --vocab-size is given, which a recipe of all words needs. --stack adds
a line for the stack of that many layers, without injection, that has as many parameters as the recipe's model: its width is
the same, its inner width is solved for.

exit codes: 0 done; 2 a mistake in the call or a recipe, or no stack matches within 0.5 %; 130 stopped by
SIGINT.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="count_parameters",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipes", nargs="+", metavar="recipe", help="a YAML file")
    parser.add_argument("--stack", type=int, metavar="LAYERS", help="find the untied stack of so many layers")
    parser.add_argument("--vocab-size", type=int, help="instead of the recipe's")
    arguments = parser.parse_args()
    for option in ("vocab_size", "stack"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            parser.error(f"--{option.replace('_', '-')} {value}: expected 1 or more")

    # transformers takes seconds to import, which --help and a mistyped option need not wait for
    from deq_lm.errors import ConfigError, in_one_line
    from deq_lm.modeling import build_config, count_parameters, matching_stack
    from deq_lm.training import load_recipe

    rows = []
    try:
        for path in arguments.recipes:
            recipe = load_recipe(path)
            vocab_size = recipe.data.vocab_size if arguments.vocab_size is None else arguments.vocab_size
            if vocab_size is None:
                raise ConfigError(f"{path}: its vocabulary is known when its text has been read. Give --vocab-size.")
            rows.append((recipe.name, count_parameters(build_config(recipe.model, vocab_size))))
            if arguments.stack is not None:
                stack = matching_stack(recipe.model, arguments.stack, vocab_size)
                name = f"  stack of {arguments.stack}, d_inner {stack['cell']['d_inner']}"
                rows.append((name, count_parameters(build_config(stack, vocab_size))))
    except (ConfigError, OSError) as error:
        print(f"count_parameters: {in_one_line(str(error))}", file=sys.stderr)
        return 2
    width = max(len(name) for name, _ in rows)
    print(f"{'':<{width}}{'total':>15}{'embedding':>15}{'other':>15}")
    for name, count in rows:
        print(f"{name:<{width}}{count.total:>15,}{count.embedding:>15,}{count.other:>15,}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
