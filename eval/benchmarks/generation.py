#!/usr/bin/env python3
"""What a generated token costs: with the cache and without, by where its solve starts, and with less compute.

The text is the test split of the run's corpus, one token fed after the other, so that all rows see the same past. Times are
of one sequence, float32; a position sees as many positions before it as the text has. A picture of it is written beside the
tables, with a generated text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cells import load_benchmark_model
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from measure import benchmark_parser, interleaved_medians, run_benchmark
from torch import Tensor

from deq_lm.data.encoding import prepare
from deq_lm.errors import DataError
from deq_lm.evaluation import Decoding, load_model, model_folder, printable, write_text
from deq_lm.evaluation.modes import remembering
from deq_lm.evaluation.tables import markdown_table, write_json
from deq_lm.modeling import DEQLMForCausalLM, EquilibriumCache
from deq_lm.reporting.report import write_figure
from deq_lm.training.recipe import load_recipe

LENGTHS = (64, 128, 256, 512)
FED = 256
"""Length of the texts of which three quarters are fed token by token."""
PROMPT = "The function returns"
COLUMNS, LINE, ADVANCE = 84, 13.0, 0.602
"""Of the generated text in the picture: characters a line, its height in points, and a character's width in font sizes."""


def text_of(run: Path, num_sequences: int, length: int, device: torch.device) -> Tensor:
    """Consecutive pieces of the test split, (num_sequences, length) int64."""
    tokens = prepare(load_recipe(run / "recipe.yaml").data).splits["test"].tokens
    if len(tokens) < num_sequences * length:
        raise DataError(f"{run}: its test split has {len(tokens)} tokens; {num_sequences * length} are needed.")
    return torch.as_tensor(tokens[: num_sequences * length].astype("int64"), device=device).view(num_sequences, length)


def cost_by_length(model: DEQLMForCausalLM, ids: Tensor, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Milliseconds of the token after so many, with the cache of these and by solving the whole text."""
    rows = []
    for length in LENGTHS:
        cache = EquilibriumCache()
        text, new = ids[:1, :length], ids[:1, length : length + 1]
        model(text, past_key_values=cache, return_logits=False)
        layer = cache.layer
        before = (layer.memory, layer.num_evaluations, layer.ids)

        def cached(layer: Any = layer, before: Any = before, cache: Any = cache, new: Tensor = new) -> None:
            layer.memory, layer.num_evaluations, layer.ids = before
            model(new, past_key_values=cache, logits_to_keep=1)

        def anew(text: Tensor = ids[:1, : length + 1]) -> None:
            model(text, sliding=True, logits_to_keep=1)

        runs: dict[str, Callable[[], Any]] = {"cached": cached, "anew": anew}
        seconds = interleaved_medians(runs, rounds=rounds, device=device)
        rows.append(
            {
                "tokens before": length,
                "cached, ms": f"{1e3 * seconds['cached']:.1f}",
                "whole text, ms": f"{1e3 * seconds['anew']:.1f}",
                "ratio": f"{seconds['anew'] / seconds['cached']:.1f}",
            }
        )
    return rows


def fed(model: DEQLMForCausalLM, ids: Tensor, cache: EquilibriumCache, **options: Any) -> tuple[Tensor, float]:
    """Evaluations of the tokens fed one by one after the first quarter, (B, T), and nats of each next one on average."""
    begin = ids.shape[1] // 4
    model(ids[:, :begin], past_key_values=cache, return_logits=False, **options)
    nats = 0.0
    for position in range(begin, ids.shape[1] - 1):
        new, target = ids[:, position : position + 1], ids[:, position + 1 : position + 2]
        nats += float(model(new, targets=target, past_key_values=cache, return_logits=False, **options).nll_nats)
    assert cache.num_evaluations is not None
    return cache.num_evaluations[:, begin:].float(), nats / (len(ids) * (ids.shape[1] - 1 - begin))


def evaluations_by_start(model: DEQLMForCausalLM, ids: Tensor) -> list[dict[str, Any]]:
    """Evaluations of a token's solve from zero and from f(z*) of the token before."""
    rows = []
    for name, warm_start in (("zero", False), ("the token before", True)):
        counts, nats = fed(model, ids, EquilibriumCache(warm_start=warm_start))
        rows.append(
            {
                "start": name,
                "mean evaluations": f"{counts.mean():.2f}",
                "most": int(counts.max()),
                "nats per token": f"{nats:.4f}",
            }
        )
    return rows


def loss_by_compute(model: DEQLMForCausalLM, ids: Tensor) -> list[dict[str, Any]]:
    """Nats per token when no token gets more than so many evaluations, and when each gets what it needs."""
    rows = []
    for number in (1, 2, 3, 4, 6, 8, None):
        counts, nats = fed(model, ids, EquilibriumCache(), **({} if number is None else {"max_evaluations": number}))
        row = {"max_evaluations": number or "-", "mean evaluations": f"{counts.mean():.2f}"}
        rows.append({**row, "nats per token": f"{nats:.3f}"})
    return rows


def written(run: Path) -> list[tuple[str, int]]:
    """Pieces of a generated text, each with the evaluations that predicted its last token."""
    model, tokenizer = load_model(model_folder(run))
    pieces = []
    decoding = Decoding(num_tokens=110, temperature=0.7)
    write_text(model, tokenizer, PROMPT, decoding, on_text=lambda text, count: pieces.append((text, count or 0)))
    return pieces


def picture(tables: dict[str, list[dict[str, Any]]], pieces: list[tuple[str, int]]) -> Figure:
    """The text coloured by evaluations, above times by length and loss by compute."""
    figure = Figure(figsize=(7.6, 5.4), layout="constrained")
    counts = [count for _, count in pieces]
    norm: Any = Normalize(min(counts), max(counts))
    shades = LinearSegmentedColormap.from_list("few to many", ["#3b7dd8", "#8a63c9", "#d9402a"])
    text = figure.add_subplot(2, 1, 1)
    text.axis("off")
    _write(text, pieces, lambda count: shades(float(norm(count))))
    figure.colorbar(ScalarMappable(norm, shades), ax=text, label="evaluations", fraction=0.03, pad=0.01)
    times, loss = figure.add_subplot(2, 2, 3), figure.add_subplot(2, 2, 4)
    for column, label in (("whole text, ms", "whole text anew"), ("cached, ms", "cached")):
        rows = tables["a token after so many"]
        times.plot(
            [row["tokens before"] for row in rows], [float(row[column]) for row in rows], marker="o", label=label
        )
    times.set(xlabel="tokens before", ylabel="ms a token", yscale="log")
    times.set_xscale("log", base=2)
    times.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
    times.legend(frameon=False)
    rows = [row for row in tables["less compute"] if row["max_evaluations"] != "-"]
    loss.plot([row["max_evaluations"] for row in rows], [float(row["nats per token"]) for row in rows], marker="o")
    loss.set(xlabel="max_evaluations", ylabel="nats a token")
    for axes in (times, loss):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _write(axes: Axes, pieces: list[tuple[str, int]], shade: Callable[[int], Any]) -> None:
    """Characters of one width, line by line from the upper left corner."""
    size, row, column = 8.5, 0, 0
    for piece, count in [(PROMPT, 0), *pieces]:
        for i, part in enumerate(printable(piece).split("\n")):
            if i or column + len(part) > COLUMNS:
                row, column = row + 1, 0
            place = (column * ADVANCE * size, -(row + 1) * LINE)
            color = shade(count) if count else "black"
            style: dict[str, Any] = {"family": "monospace", "size": size, "color": color}
            axes.annotate(part, (0, 1), place, "axes fraction", textcoords="offset points", **style)
            column += len(part)


def measure(arguments: argparse.Namespace) -> None:
    """Measure all three, print and write the tables and the picture."""
    model = load_benchmark_model(arguments.model, arguments.device)
    ids = text_of(arguments.model, 4, max(LENGTHS) + 1, arguments.device)
    tables = {}
    with torch.no_grad():
        with remembering(model, max(LENGTHS)):
            tables["a token after so many"] = cost_by_length(model, ids, arguments.rounds, arguments.device)
        tables["where a solve starts"] = evaluations_by_start(model, ids[:, :FED])
        tables["less compute"] = loss_by_compute(model, ids[:, :FED])
    for title, rows in tables.items():
        print(f"\n## {title}\n\n{markdown_table(rows)}", flush=True)
    write_json(arguments.output, {"tables": tables})
    write_figure(lambda: picture(tables, written(arguments.model)), arguments.output.with_suffix(".svg"))


def main() -> int:
    return run_benchmark(benchmark_parser(__doc__, "generation"), measure)


if __name__ == "__main__":
    sys.exit(main())
