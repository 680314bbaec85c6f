"""Strict construction of dataclasses from mappings: what is accepted, and what every refusal says."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deq_lm.errors import ConfigError
from deq_lm.structure import build, choose, to_mapping


@dataclass(frozen=True)
class Optimizer:
    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    fused: bool = False

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr}: expected more than 0.")


@dataclass(frozen=True)
class Training:
    max_steps: int
    optimizer: Optimizer
    precision: Literal["bf16"] | None = None
    clip_norm: float | None = 1.0
    layers: list[int] = field(default_factory=list)
    free: Mapping[str, Any] = field(default_factory=dict)
    name: str = "run"


VALID = {"max_steps": 5, "optimizer": {"lr": 1}}


def refusal(mapping: Any, cls: type = Training) -> str:
    with pytest.raises(ConfigError) as caught:
        build(cls, mapping, "recipe")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_valid_mapping_gives_the_instance_with_defaults_from_the_dataclass():
    built = build(Training, {**VALID, "layers": [1, 2], "precision": "bf16", "clip_norm": None})
    assert built == Training(5, Optimizer(1.0), precision="bf16", clip_norm=None, layers=[1, 2])
    assert type(built.optimizer.lr) is float
    assert build(Optimizer, {"lr": 0.5, "betas": [0, 1]}).betas == (0.0, 1.0)


def test_to_mapping_is_the_inverse_and_survives_json():
    built = build(Training, {**VALID, "free": {"a": [1, {"b": None}]}})
    mapping = to_mapping(built)
    assert json.loads(json.dumps(mapping)) == mapping
    assert build(Training, mapping) == built


def test_an_unknown_key_is_refused_at_its_place_and_the_nearest_key_is_named():
    message = refusal({**VALID, "optimizer": {"lr": 1, "beta": [0, 1]}})
    assert message.startswith("recipe.optimizer.beta: unknown key; did you mean betas?")
    assert "Valid here: lr, betas, fused" in message


def test_a_missing_key_is_named():
    assert refusal({}).startswith("recipe: missing max_steps, optimizer")
    assert refusal({"max_steps": 1, "optimizer": {}}).startswith("recipe.optimizer: missing lr")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_steps": 5.0}, ["recipe.max_steps", "a whole number", "5.0"]),
        ({"max_steps": True}, ["recipe.max_steps", "a whole number", "the truth value True"]),
        ({"max_steps": None}, ["recipe.max_steps", "a whole number", "null"]),
        ({"max_steps": [1]}, ["recipe.max_steps", "a list"]),
        ({"optimizer": 3}, ["recipe.optimizer", "a section"]),
        ({"optimizer": {"lr": 1, "fused": 1}}, ["recipe.optimizer.fused", "true or false"]),
        ({"optimizer": {"lr": 1, "fused": "no"}}, ["recipe.optimizer.fused", "true or false", "'no'"]),
        ({"optimizer": {"lr": 1, "betas": [1]}}, ["recipe.optimizer.betas", "a list of 2"]),
        ({"optimizer": {"lr": 1, "betas": "01"}}, ["recipe.optimizer.betas", "a list"]),
        ({"optimizer": {"lr": 1, "betas": [1, "x"]}}, ["recipe.optimizer.betas[1]", "a number"]),
        ({"precision": "fp16"}, ["recipe.precision", "'fp16'", "Valid here: bf16"]),
        ({"layers": [1, 2.5]}, ["recipe.layers[1]", "a whole number"]),
        ({"name": 7}, ["recipe.name", "text", 'in quotes, for example "7"']),
        ({7: 1}, ["recipe", "7 is not text"]),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_at_its_place(change, words):
    message = refusal({**VALID, **change})
    assert message.startswith(words[0])
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("1e-3", "write 1.0e-3"),
        ("3E5", "write 3.0e+5"),
        ("-2.5e7", "write -2.5e+7"),
        (".5", "write 0.5 without quotes"),
        ("0.1", "write 0.1 without quotes"),
        ("010", "write 10.0 without quotes"),
    ],
)
def test_a_number_given_as_text_is_refused_with_the_spelling_that_works(text, advice):
    assert advice in refusal({"lr": text}, Optimizer)


def test_a_whole_number_given_as_text_is_refused_with_its_digits():
    assert "write 1000" in refusal({**VALID, "max_steps": "1e3"})
    assert "write" not in refusal({**VALID, "max_steps": "many"})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400])
def test_a_number_that_is_not_finite_is_refused(value):
    assert "expected a finite number" in refusal({"lr": value}, Optimizer)


def test_a_literal_does_not_take_one_for_true():
    @dataclass(frozen=True)
    class Choice:
        value: Literal[1, "a"]

    assert build(Choice, {"value": 1}).value == 1
    refusal({"value": True}, Choice)


def test_what_post_init_refuses_is_reported_at_its_place():
    message = refusal({**VALID, "optimizer": {"lr": -1}})
    assert message == "recipe.optimizer: lr=-1.0: expected more than 0."


def test_choose_picks_by_name_and_lists_the_names_it_knows():
    table = {"adam": Optimizer, "other": Training}
    assert choose(table, {"name": "adam", "lr": 2}) == Optimizer(2.0)
    with pytest.raises(ConfigError, match=r"recipe\.x\.name: .*'adan'.*did you mean adam.*adam, other"):
        choose(table, {"name": "adan", "lr": 2}, "recipe.x")
    with pytest.raises(ConfigError, match=r"recipe\.x: missing name; expected one of adam, other"):
        choose(table, {"lr": 2}, "recipe.x")
    with pytest.raises(ConfigError, match=r"recipe\.x\.lr2: unknown key; did you mean lr"):
        choose(table, {"name": "adam", "lr2": 2}, "recipe.x")


TEXT = st.text("abe1.-\n", max_size=5)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)
@given(st.fixed_dictionaries({}, optional=dict.fromkeys([*Training.__dataclass_fields__, "other\nkey"], PLAIN)))
def test_any_mapping_gives_an_instance_or_a_config_error_of_one_line(mapping):
    try:
        built = build(Training, mapping)
    except ConfigError:
        assert refusal(mapping).startswith("recipe")
    else:
        assert build(Training, to_mapping(built)) == built


@settings(deadline=None)
@given(st.integers(min_value=0, max_value=10**25), st.integers(min_value=-30, max_value=30))
def test_the_advised_spelling_is_one_the_yaml_loader_reads_as_the_same_number(mantissa, exponent):
    yaml = pytest.importorskip("yaml")
    text = f"{mantissa}e{exponent}"
    advice = refusal({"lr": text}, Optimizer).split("write ")[1].split(" ")[0]
    assert yaml.safe_load(advice) == float(text)
