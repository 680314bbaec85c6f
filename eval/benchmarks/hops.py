#!/usr/bin/env python3
"""Following a chain: how many hops a model learns, by its depth.

A line of text lists the ten links of a cycle through ten letters in random order, and then asks 14 times where a letter leads
in 1 to 8 hops, more often in few: "b e h j a d ... . d 2 h f 1 h": from d two hops lead to h. What a hop needs is the link that the hop before
has led to, so that a layer of attention takes one, or, where it joins two stretches of the chain that were found before,
doubles their length. Letters, links and questions are random: beside the answers nothing can be learned, and every line takes
the same nats from a model that knows all answers.

--write makes the text, {train,valid,test}.txt, one seed each, for `scripts/train_lm.py` with data.corpus=text,
data.tokenizer=word_level; the suite `hops` trains on it. --runs scores such runs on lines that no split has:

accuracy: share of the answers that the model finds most likely, after a line before for memory. 0.1 is chance.
excess nats: mean nats of an answer; 0 is certainty of the right one, log(10) = 2.303 is chance.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measure import count, default_output, device, run_benchmark
from torch import Tensor

from deq_lm.errors import DataError
from deq_lm.evaluation.loading import load_model, model_folder
from deq_lm.evaluation.modes import measuring
from deq_lm.evaluation.tables import markdown_table, write_json
from deq_lm.modeling import DEQLMForCausalLM

LETTERS, HOPS, QUESTIONS = "abcdefghij", 8, 14
WORDS = 2 * len(LETTERS) + 1 + 3 * QUESTIONS
SPLITS = {"train": (0, 320_000), "valid": (1, 2_048), "test": (2, 8_192)}
"""Seed and lines of each; the lines scored have seeds of their own."""

EPILOG = """examples:
  python eval/benchmarks/hops.py --write data/hops
  python eval/run.py hops data.data_dir=data/hops
  python eval/benchmarks/hops.py --runs equilibrium=runs/hops/equilibrium_0 "2 layers=runs/hops/unrolled_2_0"

exit codes: 0 done; 2 a mistake in the call.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="eval/benchmarks/hops.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=default_output("hops"), help="default: results/hops.json")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, metavar="FOLDER", help="write the text into a new folder")
    what.add_argument("--runs", nargs="+", metavar="NAME=RUN", help="score runs trained on it")
    parser.add_argument("--lines", type=count, default=1024, help="scored; default: 1024")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(threads=1)
    return run_benchmark(parser, run)


def run(arguments: argparse.Namespace) -> None:
    """Write the text, or score runs, print and write the table."""
    if arguments.write is not None:
        write_text_files(arguments.write)
        return
    rows = []
    for named in arguments.runs:
        name, equals, folder = named.partition("=")
        if not equals:
            raise DataError(f"--runs {named}: expected NAME=RUN.")
        model, tokenizer = load_model(model_folder(Path(folder)))
        rows += ({"model": name, **row} for row in score(model.to(arguments.device), tokenizer, arguments.lines))
    print(f"\n{markdown_table(rows)}\n")
    write_json(arguments.output, {"lines": arguments.lines, "tables": {"hops": rows}})


def write_text_files(folder: Path) -> None:
    """Raises DataError if the folder is there."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise DataError(f"{folder}: is there already. Give a new folder.") from error
    for split, (seed, num_lines) in SPLITS.items():
        with (folder / f"{split}.txt").open("w", encoding="utf-8") as file:
            file.writelines(f"{' '.join(words)}\n" for words, _ in lines(seed, num_lines))
    print(f"written: {folder}")


def lines(seed: int, number: int) -> Iterator[tuple[list[str], list[int]]]:
    """The words of each line, and how many hops its questions ask for."""
    chance = random.Random(seed)
    for _ in range(number):
        cycle = chance.sample(LETTERS, len(LETTERS))

        def led_to(start: str, hops: int, cycle: list[str] = cycle) -> str:
            return cycle[(cycle.index(start) + hops) % len(cycle)]

        words = [word for letter in chance.sample(LETTERS, len(LETTERS)) for word in (letter, led_to(letter, 1))] + ["."]
        asked = [chance.randint(1, chance.randint(1, HOPS)) for _ in range(QUESTIONS)]  # few hops are learned first
        for hops in asked:
            start = chance.choice(LETTERS)
            words += [start, str(hops), led_to(start, hops)]
        yield words, asked


@torch.no_grad()
def score(model: DEQLMForCausalLM, tokenizer: Any, num_lines: int) -> Iterator[dict[str, Any]]:
    """A row for each number of hops."""
    before, scored = ([*lines(seed, num_lines)] for seed in (3, 4))
    answers = torch.arange(2 * len(LETTERS) + 1 + 2, WORDS, 3)
    hops = torch.tensor([asked for _, asked in scored])
    found = []
    with measuring(model):
        for start in range(0, num_lines, 128):
            ids = [encode(tokenizer, part[start : start + 128]).to(model.device) for part in (before, scored)]
            memory = model(ids[0], return_logits=False).memory
            logits = model(ids[1], memory=memory).logits[:, answers].double().log_softmax(dim=-1)
            found.append((logits, ids[1][:, answers + 1]))
    logits, targets = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    right = (logits.argmax(dim=-1) == targets).double()
    nats = -logits.gather(-1, targets[..., None]).squeeze(-1)
    for number in range(1, HOPS + 1):
        of_number = hops == number
        yield {
            "hops": number,
            "answers": int(of_number.sum()),
            "accuracy": right[of_number].mean().item(),
            "excess nats": nats[of_number].mean().item(),
        }


def encode(tokenizer: Any, part: list[tuple[list[str], list[int]]]) -> Tensor:
    """Lines as tokens, each after the end of the one before, as a segment holds them: (B, 1 + WORDS)."""
    return torch.tensor([tokenizer(f"\n{' '.join(words)}")["input_ids"] for words, _ in part])


if __name__ == "__main__":
    sys.exit(main())
