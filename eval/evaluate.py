#!/usr/bin/env python3
"""Measure a trained model: perplexity beside n-gram models, causality, solves, memory, a sample."""

import argparse
import json
import logging
import sys
from pathlib import Path

EPILOG = """examples:
  python eval/evaluate.py runs/demo_cpu
  python eval/evaluate.py runs/demo_cpu/checkpoints/step_00000600 --split valid
  python eval/evaluate.py runs/demo_cpu --corpus text --data-dir my_texts --output my_texts.json
  python eval/evaluate.py runs/demo_cpu evaluation.segment_length=128 evaluation.causality_cuts=1000

Text and protocol are those of the run's recipe.yaml, looked for in the checkpoint's folder and the two above it; settings
of its sections data and evaluation can be replaced. The tokenizer is always the checkpoint's. The n-gram models are fitted
to the training split of the same corpus. Start it with `accelerate launch` to share the scoring among processes.

exit codes: 0 done; 2 a mistake in the call, the checkpoint, the recipe or the data.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="eval/evaluate.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="a run folder, its final/ or one of its checkpoints/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings to replace in the recipe")
    parser.add_argument("--recipe", type=Path, help="a recipe to take instead of the run's")
    parser.add_argument("--corpus", help="another corpus, for data.corpus; data.data_dir is then --data-dir or none")
    parser.add_argument("--data-dir", help="where the corpus is, for data.data_dir")
    parser.add_argument("--split", choices=("train", "valid", "test"), default="test", help="default: test")
    parser.add_argument(
        "--output",
        type=Path,
        help="JSON file to write; default: with the checkpoint, evaluation.json, or evaluation_CORPUS_SPLIT.json where "
        "another split or setting was given",
    )
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.WARNING, format="eval/evaluate.py: %(message)s")

    # torch and transformers take seconds to import, which --help and a mistyped option need not wait for
    from deq_lm.errors import CheckpointError, ConfigError, DataError, in_one_line

    try:
        measure(arguments)
    except (CheckpointError, ConfigError, DataError, OSError) as error:
        print(f"eval/evaluate.py: {in_one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


def measure(arguments: argparse.Namespace) -> None:
    """Load, measure, write and print, in as many processes as the launcher has started."""
    from dataclasses import replace

    from accelerate import Accelerator

    from deq_lm.data.encoding import PREPARED, prepare
    from deq_lm.errors import CheckpointError
    from deq_lm.evaluation import evaluate, render, score_split, write_record
    from deq_lm.evaluation.loading import load_model, model_folder
    from deq_lm.evaluation.model_card import write_model_card
    from deq_lm.evaluation.records import check_output
    from deq_lm.structure import to_mapping
    from deq_lm.training import load_recipe
    from deq_lm.training.checkpoint import MANIFEST, damage

    folder = model_folder(arguments.checkpoint)
    sealed = (folder / MANIFEST).exists()
    if sealed and (problem := damage(folder)) is not None:
        raise CheckpointError(f"{problem}. Measure another checkpoint.")
    overrides = data_overrides(arguments) + arguments.overrides
    recipe = load_recipe(arguments.recipe or recipe_file(folder), overrides)
    is_plain = not overrides and arguments.recipe is None and arguments.split == "test"
    name = "evaluation" if is_plain else f"evaluation_{recipe.data.corpus}_{arguments.split}"
    # A sealed folder takes no more files: the next one to resume from it would take it for damaged.
    beside = folder.with_name(f"{folder.name}.{name}.json") if sealed else folder / f"{name}.json"
    output = arguments.output or beside
    check_output(output)

    accelerator = Accelerator()
    model, tokenizer = load_model(folder)
    data = recipe.data
    if data.corpus != PREPARED:  # which has its tokenizer, and is checked below
        data = replace(data, tokenizer=str(folder), vocab_size=None)
    with accelerator.main_process_first():
        corpus = prepare(data)
    if corpus.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise CheckpointError(
            f"{folder}: its tokenizer is not the one {data.data_dir} was prepared with. Prepare the text with "
            f"--tokenizer {folder}."
        )
    model.to(accelerator.device)
    scored = score_split(model, corpus.splits[arguments.split], recipe.evaluation, accelerator)
    if accelerator.is_main_process:
        result = evaluate(
            model,
            corpus,
            recipe.evaluation,
            split=arguments.split,
            scored=scored,
            seed=recipe.seed,
            location=str(folder),
            recipe=to_mapping(replace(recipe, data=data)),
        )
        write_record(output, result)
        if output == folder / "evaluation.json":
            write_model_card(folder, result)
        print(f"{render(result)}\n\nwritten to {output}")


def data_overrides(arguments: argparse.Namespace) -> list[str]:
    """--corpus and --data-dir as overrides of the recipe."""
    data_dir = None if arguments.data_dir is None else f"data.data_dir={json.dumps(arguments.data_dir)}"
    if arguments.corpus is not None:
        return [f"data.corpus={json.dumps(arguments.corpus)}", data_dir or "data.data_dir=null"]
    return [data_dir] if data_dir else []


def recipe_file(folder: Path) -> Path:
    """The recipe.yaml of the run that a model folder belongs to."""
    from deq_lm.errors import CheckpointError

    for place in (folder, *folder.resolve().parents[:2]):
        if (place / "recipe.yaml").is_file():
            return place / "recipe.yaml"
    raise CheckpointError(
        f"{folder}: no recipe.yaml there or in the two folders above, to say on what text to measure and how. Give one, "
        "for example --recipe recipes/demo_cpu.yaml."
    )


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    sys.exit(main())
