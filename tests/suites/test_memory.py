"""Peak memory of a training step by part: flat for an equilibrium, and a leak that grows with evaluations is found."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from deq_lm.errors import ConfigError
from deq_lm.modeling.builders import SOLVERS
from deq_lm.solvers import Picard
from deq_lm.suites.config import MemorySettings
from deq_lm.suites.memory import StepMemory, measure_memory

CPU = torch.device("cpu")
SETTINGS = MemorySettings(num_evaluations=(2, 4, 8))


def rows_of(subjects, settings: MemorySettings = SETTINGS) -> dict[tuple[str, bool], list[StepMemory]]:
    rows: dict[tuple[str, bool], list[StepMemory]] = {}
    for row in measure_memory("tiny", subjects, settings, CPU).rows:
        rows.setdefault((row.model, row.regularized), []).append(row)
    return rows


def test_activations_of_an_equilibrium_are_flat_and_those_of_the_unrolled_model_grow(subjects):
    rows = rows_of(subjects)
    for regularized in (False, True):
        assert len({row.most_activations for row in rows["equilibrium", regularized]}) == 1
    unrolled = [row.most_activations for row in rows["unrolled", False]]
    assert unrolled[2] - unrolled[1] == 2 * (unrolled[1] - unrolled[0]) > 0  # the same bytes a layer
    assert rows["equilibrium", True][0].most_activations == rows["equilibrium", False][0].most_activations


def test_parameters_gradients_and_optimizer_state_by_hand(subjects):
    (row, *_) = rows_of(subjects)["unrolled", False]
    model = subjects[1].trained(CPU)
    cell = sum(parameter.numel() for parameter in model.model.layers.parameters())
    embedding = sum(parameter.numel() for parameter in model.parameters()) - cell
    states = len(list(model.model.layers.parameters()))  # a counter of steps each, float32
    assert row.at_peak is not None
    # a parameter and two moments, and those gradients that are there at the peak
    assert 0 <= row.at_peak.weights - 4 * states - 4 * 3 * cell <= 4 * cell
    assert 4 * 3 * embedding <= row.at_peak.embedding <= 4 * 4 * embedding + 100
    parts = row.at_peak.embedding + row.at_peak.without_embedding
    assert parts <= row.largest <= parts + 4 * embedding


@dataclass(frozen=True, kw_only=True)
class Hoarder(Picard):
    """Picard that keeps every state it has been in."""

    def step(self, f, state, active):
        KEPT.append(state.point + 0.0)
        return super().step(f, state, active)


KEPT: list[torch.Tensor] = []


def test_a_solver_that_keeps_what_it_should_forget_is_found(subjects, monkeypatch):
    monkeypatch.setitem(SOLVERS, "hoarder", Hoarder)
    recipe = subjects[0].recipe
    hoarding = replace(subjects[0], recipe=replace(recipe, model={**recipe.model, "solver": {"name": "hoarder"}}))
    honest = replace(subjects[0], recipe=replace(recipe, model={**recipe.model, "solver": {"name": "picard"}}))

    def growth(subject) -> int:
        found = [row.at_peak.without_embedding for row in rows_of([subject])["equilibrium", False]]
        return found[2] - found[0]

    state = 4 * 8 * 16 * 4  # sequences, positions, width, float32
    assert growth(hoarding) - growth(honest) >= 6 * state  # 8 evaluations, not 2
    KEPT.clear()


def test_out_of_memory_is_a_row_without_numbers(subjects):
    enough = max(row.largest for row in rows_of(subjects[1:])["unrolled", False][:2])
    rows = rows_of(subjects[1:], replace(SETTINGS, limit_bytes=enough))["unrolled", False]
    assert [row.at_peak is None for row in rows] == [False, False, True]
    assert [row.most_activations is None for row in rows] == [False, False, True]


def test_the_shape_is_the_suites(subjects):
    settings = MemorySettings(num_evaluations=(2,), batch_size=2, segment_length=5, mem_len=3)
    result = measure_memory("tiny", subjects[:1], settings, CPU)
    assert (result.batch_size, result.segment_length, result.mem_len) == (2, 5, 3)


def test_steps_of_different_shape_are_not_compared(subjects):
    recipe = subjects[1].recipe
    larger = replace(subjects[1], recipe=replace(recipe, training=replace(recipe.training, batch_size=5)))
    with pytest.raises(ConfigError, match=r"\[\(4, 8, 8\), \(5, 8, 8\)\]. Give memory the three"):
        rows_of([subjects[0], larger])


def test_a_vocabulary_that_only_the_text_decides_has_to_be_given(subjects, tmp_path):
    recipe = subjects[0].recipe
    unknown = replace(
        subjects[0],
        recipe=replace(recipe, data=replace(recipe.data, tokenizer="word_level", vocab_size=None)),
        run=replace(subjects[0].run, path=tmp_path),
    )
    with pytest.raises(ConfigError, match=r"Give memory.vocab_size"):
        rows_of([unknown])
    assert rows_of([unknown], replace(SETTINGS, vocab_size=50))
