"""The plots, each from measurements to a figure, or None where nothing was measured that it could show."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from deq_lm.evaluation import EvaluationResult, compare, model_name
from deq_lm.reporting.measurements import Measurements
from deq_lm.reporting.scale import families
from deq_lm.suites import ConvergenceResult, CostResult, LearningResult, MemoryResult
from deq_lm.suites.memory import StepMemory

COLORS = ("#3b7dd8", "#d9732a", "#8a63c9", "#1f9e77", "#c2477f", "#8c8c2a")
"""One a model; legible on white and on black."""

MEGABYTE = 1e6


def memory_against_depth(measurements: Measurements) -> Figure | None:
    """Activations kept for the backward pass, and the peak without the embedding, against evaluations or layers."""
    results = measurements.of(MemoryResult)
    if not results:
        return None
    figure, panels = _figure(2)
    values: Mapping[str, Callable[[StepMemory], int | None]] = {
        "activations kept, MB": lambda row: row.most_activations,
        "peak without embedding, MB": lambda row: row.at_peak.without_embedding if row.at_peak else None,
    }
    for axes, (label, value) in zip(panels, values.items(), strict=True):
        for name, rows in _memory_lines(results[0]).items():
            known = [(row.num_evaluations, number / MEGABYTE) for row in rows if (number := value(row)) is not None]
            if known:
                style = "--" if rows[0].regularized else "-"
                axes.plot(
                    *zip(*known, strict=True),
                    style,
                    marker="o",
                    markersize=4,
                    color=_color(measurements, rows[0].model),
                    label=name,
                )
        _axes(axes, "evaluations of the cell, or layers", label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        _plain_ticks(axes, sorted({row.num_evaluations for row in results[0].rows}))
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def memory_parts(measurements: Measurements) -> Figure | None:
    """What the peak of a step is made of, each model at its largest depth."""
    results = measurements.of(MemoryResult)
    rows = [lines[-1] for lines in _memory_lines(results[0]).values() if lines[-1].at_peak] if results else []
    if not rows:
        return None
    figure, (axes,) = _figure(1, height=0.45 * len(rows) + 1.3)
    names = [f"{_line_name(row)}, {row.num_evaluations}" for row in rows]
    left = np.zeros(len(rows))
    for i, part in enumerate(("weights", "activations", "solver", "output_layer", "rest")):
        widths = np.array([getattr(row.at_peak, part) / MEGABYTE for row in rows])
        axes.barh(names, widths, left=left, color=COLORS[i], label=part.replace("_", " "), height=0.6)
        left += widths
    axes.invert_yaxis()
    _axes(axes, "MB at the peak, embedding left out", None)
    axes.legend(frameon=False, fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    return figure


def loss_against_evaluations(measurements: Measurements) -> Figure | None:
    """Test-time compute: loss of solves stopped early, by solver."""
    results = measurements.of(ConvergenceResult)
    if not results:
        return None
    figure, (axes,) = _figure(1)
    for i, (solver, points) in enumerate(_by_solver(results).items()):
        axes.plot(
            *_line(points, lambda point: point.nats_per_token),
            marker="o",
            markersize=4,
            color=COLORS[(3 + i) % len(COLORS)],
            label=solver,
        )
    _axes(axes, "evaluations of the cell in every solve", "nats per token")
    axes.set_xscale("log", base=2)
    _plain_ticks(axes, [1, 2, 4, 8, 16, 32, 64])
    lowest = [
        n for points in _by_solver(results).values() for n in _line(points, lambda point: point.nats_per_token)[1]
    ]
    axes.set_ylim(min(lowest) - 0.03, min(max(lowest), min(lowest) + 1.0) + 0.03)
    axes.legend(frameon=False, fontsize=8)
    return figure


def residual_against_evaluations(measurements: Measurements) -> Figure | None:
    """Median residual, and the band up to the 95 % quantile, by solver."""
    results = measurements.of(ConvergenceResult)
    if not results:
        return None
    figure, (axes,) = _figure(1)
    for i, (solver, points) in enumerate(_by_solver(results).items()):
        color = COLORS[(3 + i) % len(COLORS)]
        axes.plot(
            *_line(points, lambda point: point.median_residual), color=color, marker="o", markersize=4, label=solver
        )
        axes.plot(*_line(points, lambda point: point.residual_95), color=color, linewidth=0.8, linestyle=":")
    _axes(axes, "evaluations of the cell", "relative residual")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _plain_ticks(axes, [1, 2, 4, 8, 16, 32, 64])
    axes.legend(frameon=False, fontsize=8)
    return figure


def residual_by_position(measurements: Measurements) -> Figure | None:
    """Heat map: decimal logarithm of the residual at each position after each budget."""
    results = measurements.of(ConvergenceResult)
    if not results:
        return None
    first = results[0]
    figure, (axes,) = _figure(1)
    values = np.array([[np.nan if value is None else value for value in row] for row in first.position_residuals])
    image = axes.imshow(np.log10(np.maximum(values, 1e-12)), aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(first.settings.num_evaluations)), [str(n) for n in first.settings.num_evaluations])
    _axes(axes, "position in the segment", "evaluations")
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label="log10 of the relative residual")
    return figure


def contraction_over_training(measurements: Measurements) -> Figure | None:
    """Spectral radius and norm of the Jacobian at the equilibria of each checkpoint."""
    results = [result for result in measurements.of(ConvergenceResult) if len(result.contraction) > 1]
    if not results:
        return None
    figure, (axes,) = _figure(1)
    for i, result in enumerate(results):
        steps = [point.step for point in result.contraction]
        for j, (name, (style, label)) in enumerate(_CONTRACTION.items()):
            numbers = [getattr(point, name) for point in result.contraction]
            axes.plot(
                steps, numbers, style, color=COLORS[j], alpha=max(0.3, 1 - 0.25 * i), label=label if i == 0 else None
            )
    axes.axhline(1.0, color="gray", linewidth=0.8)
    _axes(axes, "training step", None)
    axes.legend(frameon=False, fontsize=8)
    return figure


_CONTRACTION: Mapping[str, tuple[str, str]] = {
    "max_spectral_radius": ("-", "spectral radius, largest"),
    "median_spectral_radius": ("--", "spectral radius, median"),
    "jacobian_norm": (":", "norm of a column of the Jacobian"),
}


def learning_curves(measurements: Measurements) -> Figure | None:
    """Training loss, mean over the seeds, against tokens and, where costs were measured, operations and seconds.

    Seconds are steps times the time of one, measured in turns: runs may have shared their machine.
    """
    results = measurements.of(LearningResult)
    if not results:
        return None
    cost = measurements.first(CostResult)
    costs = {row.model: row for row in (cost.rows if cost else ())}
    figure, panels = _figure(3 if costs else 1)
    for name, runs in _by_model(results).items():
        points = list(zip(*(run.training for run in runs), strict=False))  # of the same step in every run
        losses = [_mean([point.nats_per_token for point in same]) for same in points]
        tokens = np.array([same[0].num_tokens for same in points])
        steps = np.array([same[0].step for same in points])
        line = {"color": _color(measurements, name), "linewidth": 1.2}
        panels[0].plot(tokens / 1e6, losses, label=name, **line)
        if name in costs:
            panels[1].plot(costs[name].training_flops * tokens / 1e12, losses, **line)
            panels[2].plot(costs[name].training_seconds * steps, losses, **line)
    known = [point.nats_per_token for run in results for point in run.training if point.nats_per_token is not None]
    for axes, label in zip(panels, ("tokens, millions", "10^12 operations", "seconds of training"), strict=False):
        _axes(axes, label, "training loss, nats per token" if axes is panels[0] else None)
        if known:
            axes.set_ylim(min(known) - 0.1, min(known) + 1.5)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def cost_frontier(measurements: Measurements) -> Figure | None:
    """Test loss of each model against its training's operations, and against its activations."""
    points = frontier(measurements)
    if not points:
        return None
    figure, panels = _figure(2)
    for axes, (key, label) in zip(
        panels, (("flops", "training, operations per token"), ("activations", "activations kept, MB")), strict=True
    ):
        for name, point in points.items():
            if point.get(key) is not None:
                axes.errorbar(
                    point[key],
                    point["nats"],
                    yerr=point["interval"],
                    fmt="o",
                    color=_color(measurements, name),
                    capsize=3,
                    label=name,
                )
        _axes(axes, label, "test loss, nats per token" if axes is panels[0] else None)
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.35, y=0.25)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def frontier(measurements: Measurements) -> dict[str, dict[str, Any]]:
    """Loss, operations and activations by model; of the first text."""
    texts = measurements.texts()
    if not texts or not (measurements.of(CostResult) or measurements.of(MemoryResult)):
        return {}
    cost = measurements.first(CostResult)
    flops = {row.model: row.training_flops for row in (cost.rows if cost else ())}
    results = next(iter(texts.values()))
    return {
        row.name: {
            "nats": row.nats_per_token,
            "interval": row.interval,
            "flops": flops.get(row.name),
            "activations": None
            if (found := own_memory(measurements, row.name, results)) is None or found.most_activations is None
            else found.most_activations / MEGABYTE,
        }
        for row in compare(results)
    }


def loss_against_scale(measurements: Measurements) -> Figure | None:
    """Test loss against tokens and, where costs were measured, against operations: a line for each family."""
    lines = families(measurements)
    if not lines:
        return None
    has_costs = any(point.operations is not None for points in lines.values() for point in points)
    figure, panels = _figure(2 if has_costs else 1, height=3.8)
    kinds = list(dict.fromkeys(kind for kind, _ in lines))
    sizes = sorted({size for _, size in lines})
    for (kind, size), points in lines.items():
        style = {
            "color": COLORS[kinds.index(kind) % len(COLORS)],
            "marker": _MARKERS[sizes.index(size) % len(_MARKERS)],
            "markersize": 4,
            "linewidth": 1.0,
        }
        panels[0].plot([p.tokens / 1e6 for p in points], [p.nats for p in points], label=f"{kind}, {size:,}", **style)
        known = [(p.operations / 1e12, p.nats) for p in points if p.operations is not None]
        if known:
            panels[1].plot(*zip(*known, strict=True), **style)
    for axes, label in zip(panels, ("tokens trained on, millions", "10^12 operations of training"), strict=False):
        _axes(axes, label, "test loss, nats per token" if axes is panels[0] else None)
        axes.set_xscale("log")
    _plain_ticks(panels[0], sorted({round(p.tokens / 1e6, 1) for points in lines.values() for p in points}))
    panels[0].legend(frameon=False, fontsize=7)
    return figure


_MARKERS = ("o", "s", "^", "D", "v", "P")
"""One a size."""


def own_memory(measurements: Measurements, name: str, results: Iterable[EvaluationResult]) -> StepMemory | None:
    """The step of a model as it was trained: with its number of layers or budget, or the next above that was measured.

    A regularized one if some of its steps are.
    """
    model = next((result.model for result in results if model_name(result) == name), None)
    memory = measurements.first(MemoryResult)
    rows = [row for row in (memory.rows if memory else ()) if row.model == name]
    if model is None or not rows:
        return None
    own = model["num_layers"] or model["stopping"]["max_steps"] + 1
    return min(rows, key=lambda row: (row.num_evaluations < own, abs(row.num_evaluations - own), not row.regularized))


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x: str,
    y: str,
    marks: Mapping[str, float] | None = None,
    log: bool = False,
) -> Figure:
    """Lines by name, points (x, y), of what is no `Measurements`; `marks` are vertical lines, `log` is of both axes."""
    figure, (axes,) = _figure(1)
    for i, (name, points) in enumerate(lines.items()):
        axes.plot(*zip(*points, strict=True), color=COLORS[i % len(COLORS)], marker="o", markersize=3, label=name)
    for name, place in (marks or {}).items():
        axes.axvline(place, color="gray", linewidth=0.8, linestyle="--", label=name)
    if log:
        axes.set_xscale("log")
        axes.set_yscale("log")
    _axes(axes, x, y)
    axes.legend(frameon=False, fontsize=8)
    return figure


PLOTS: Mapping[str, tuple[Callable[[Measurements], Figure | None], str]] = {
    "memory_against_depth": (
        memory_against_depth,
        "Memory of a training step against depth. A stack has one depth. Dashed: with Jacobian regularization.",
    ),
    "memory_parts": (memory_parts, "What the peak is made of, each model at its largest depth."),
    "learning_curves": (
        learning_curves,
        "Training loss against tokens, operations and time; means over the seeds.",
    ),
    "loss_against_evaluations": (
        loss_against_evaluations,
        "Loss when every solve is stopped after so many evaluations, on a part of the test split.",
    ),
    "residual_against_evaluations": (
        residual_against_evaluations,
        "Relative residual against evaluations: the median, and dotted the 95 % quantile.",
    ),
    "residual_by_position": (
        residual_by_position,
        "Relative residual at each position after each budget, median over the sequences.",
    ),
    "contraction_over_training": (
        contraction_over_training,
        "The cell's Jacobian at its equilibria over training. Above 1 plain iteration does not converge.",
    ),
    "loss_against_scale": (
        loss_against_scale,
        "Test loss against the tokens of training and its operations, by depth and number of parameters.",
    ),
    "cost_frontier": (cost_frontier, "Test loss against the operations of training, and against activations."),
}
"""By name: what draws it, and what it shows."""


def _figure(num_panels: int, *, height: float = 3.3) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(7.6 if num_panels > 1 else 6.0, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, num_panels)))


def _axes(axes: Axes, x: str, y: str | None) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y or "")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _plain_ticks(axes: Axes, ticks: Sequence[float]) -> None:
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _color(measurements: Measurements, name: str) -> str:
    return COLORS[measurements.models().index(name) % len(COLORS)]


def _line_name(row: StepMemory) -> str:
    return f"{row.model}, regularized" if row.regularized else row.model


def _memory_lines(result: MemoryResult) -> dict[str, list[StepMemory]]:
    lines: dict[str, list[StepMemory]] = {}
    for row in result.rows:
        lines.setdefault(_line_name(row), []).append(row)
    return lines


def _by_model(results: Sequence[LearningResult]) -> dict[str, list[LearningResult]]:
    found: dict[str, list[LearningResult]] = {}
    for result in results:
        found.setdefault(result.model, []).append(result)
    return found


def _by_solver(results: Sequence[ConvergenceResult]) -> dict[str, list[Any]]:
    """The points of the first model; seeds differ little beside solvers."""
    found: dict[str, list[Any]] = {}
    for point in results[0].budgets:
        found.setdefault(point.solver, []).append(point)
    return found


def _line(points: Sequence[Any], value: Callable[[Any], float | None]) -> tuple[list[int], list[float]]:
    known = [(point.num_evaluations, number) for point in points if (number := value(point)) is not None]
    return [x for x, _ in known], [y for _, y in known]


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else float("nan")
