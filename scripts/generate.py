#!/usr/bin/env python3
"""Continue a text with a trained model, token by token as it is written."""

import argparse
import logging
import os
import sys
from pathlib import Path

EPILOG = """examples:
  python scripts/generate.py runs/demo_cpu "The function returns"
  python scripts/generate.py runs/demo_cpu "The function returns" --show-compute
  python scripts/generate.py runs/demo_cpu "The function returns" --temperature 0 --max-evaluations 4
  python scripts/generate.py runs/demo_cpu                         # from the start of a document

RUN is a run folder, its final/, or one of its checkpoints. --show-compute colours every piece of text by the
evaluations of the cell that predicting it took, from blue (few) to red (many), or writes the number after it where the
output is no terminal. With --max-evaluations less compute goes into every token, for a worse text.

exit codes: 0 done; 2 a mistake in the call, or no model there; 130 stopped by SIGINT; 141 nobody reads its output any more.
"""
COLOURS = (27, 33, 39, 43, 41, 40, 76, 148, 214, 208, 202, 196)
"""From blue to red, of a terminal's 256."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="generate", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, its final/, or a checkpoint")
    parser.add_argument("prompt", nargs="?", default="", help="text to continue")
    parser.add_argument("--num-tokens", type=int, default=200, help="how many to write (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="only so many of the likeliest; 0 is all, the default")
    parser.add_argument("--top-p", type=float, default=1.0, help="only the likeliest of this probability (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: %(default)s)")
    parser.add_argument("--max-evaluations", type=int, help="compute a token may take; default: the model's own")
    parser.add_argument("--past-end", action="store_true", help="write on after the end of a document")
    parser.add_argument("--show-compute", action="store_true", help="show the evaluations each token took")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    logging.basicConfig(level=logging.WARNING, format="generate: %(message)s")

    try:
        return _write(arguments)
    except KeyboardInterrupt:
        print()
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to write on exit
        return 141


def _write(arguments: argparse.Namespace) -> int:
    # torch and transformers take seconds to import, which --help and a mistyped option need not wait for
    import torch

    from deq_lm.errors import CheckpointError, DataError, in_one_line
    from deq_lm.evaluation import Decoding, load_model, model_folder, printable, write_text

    most = 1

    def show(text: str, num_evaluations: int | None) -> None:
        text = printable(text)
        if arguments.show_compute and num_evaluations is not None:
            text = _coloured(text, num_evaluations / most) if sys.stdout.isatty() else _numbered(text, num_evaluations)
        print(text, end="", flush=True)

    try:
        _refuse_other_bytes(arguments.prompt)
        decoding = Decoding(
            num_tokens=arguments.num_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            max_evaluations=arguments.max_evaluations,
            stop_at_end=not arguments.past_end,
            seed=arguments.seed,
        )
        model, tokenizer = load_model(model_folder(arguments.run))
        if arguments.show_compute and model.config.depth != "equilibrium":
            raise ValueError(f"--show-compute: {arguments.run} solves nothing (depth={model.config.depth}).")
        rule = model.config.evaluation_stopping or model.config.stopping
        most = arguments.max_evaluations or rule["max_steps"] + 1
        if torch.cuda.is_available():
            model.cuda()  # pyright: ignore[reportCallIssue]  (the library wraps it)
        print(printable(arguments.prompt), end="", flush=True)
        sample = write_text(model, tokenizer, arguments.prompt, decoding, on_text=show)
    except BrokenPipeError:
        raise
    except (CheckpointError, DataError, OSError, ValueError) as error:
        print(f"generate: {in_one_line(str(error))}", file=sys.stderr)
        return 2
    print()
    if arguments.show_compute and sample.num_evaluations:
        counts = sample.num_evaluations
        mean = sum(counts) / len(counts)
        print(
            f"evaluations a token: mean {mean:.1f}, most {max(counts)}, of {most}, in {len(counts)} tokens",
            file=sys.stderr,
        )
    return 0


def _refuse_other_bytes(prompt: str) -> None:
    """Raises ValueError for what the shell has given as bytes that are not UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"PROMPT is not UTF-8, from character {error.start} on. Give text in UTF-8.") from error


def _numbered(text: str, number: int) -> str:
    """`text` with a number after it, on the line that it ends."""
    line = text.rstrip("\n")
    return f"{line}[{number}]{text[len(line) :]}"


def _coloured(text: str, share: float) -> str:
    """`text` for a terminal, in the colour of a share in [0, 1]."""
    colour = COLOURS[min(int(share * len(COLOURS)), len(COLOURS) - 1)]
    return f"\033[38;5;{colour}m{text}\033[0m"


if __name__ == "__main__":
    sys.exit(main())
