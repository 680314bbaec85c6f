"""Frozen dataclasses from plain mappings (YAML, JSON), strictly: nothing is guessed, converted or ignored.

`build` makes an instance, `choose` makes one of several by `name`, `to_mapping` goes back. Every mistake is a
`ConfigError` of one line that starts with the dotted place: `recipe.training.max_step: unknown key; did ...`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import PurePath
from typing import Any, Literal, TypeVar, Union

from deq_lm.errors import ConfigError, in_one_line

T = TypeVar("T")


def build(cls: type[T], mapping: Any, where: str = "recipe") -> T:
    """An instance of the dataclass `cls` from `mapping`, whose keys are the names of its fields.

    An int is accepted where a float is asked for; a bool is never a number; a list becomes a tuple where one
    is asked for; a mapping becomes a nested dataclass. Defaults are those of the dataclass.

    Args:
        cls: the dataclass; the types of its fields are the specification.
        mapping: plain data, as `yaml.safe_load` and `json.load` give it.
        where: dotted place of `mapping`, the start of every message.

    Raises:
        ConfigError: an unknown key (names the nearest valid one), a missing key, a wrong type, a number given
            as text, a number that is not finite, or a ValueError from `__post_init__`.
    """
    mapping = _checked_mapping(mapping, where)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls)) if field.init}
    for key in mapping:
        if key not in fields:
            raise ConfigError(f"{_place(where, key)}: unknown key{nearest(key, fields)}")
    missing = [name for name, field in fields.items() if name not in mapping and _is_required(field)]
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}; a value must be given, there is no default.")
    values = {key: _convert(hints[key], value, _place(where, key)) for key, value in mapping.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def choose(table: Mapping[str, type[T]], mapping: Any, where: str = "recipe") -> T:
    """An instance of the class that `mapping["name"]` picks from `table`, built from the rest of `mapping`.

    Raises:
        ConfigError: no name, a name that is not in `table` (lists those that are), or what `build` raises.
    """
    mapping = _checked_mapping(mapping, where)
    if "name" not in mapping:
        raise ConfigError(f"{where}: missing name; expected one of {', '.join(table)}.")
    name = mapping["name"]
    if not isinstance(name, str) or name not in table:
        raise ConfigError(f"{where}.name: {_show(name)} is not known{nearest(str(name), table)}")
    return build(table[name], {key: value for key, value in mapping.items() if key != "name"}, where)


def to_mapping(instance: Any) -> dict[str, Any]:
    """The plain data that `build` makes `instance` from: dicts, lists, text, numbers, None."""
    names = [field.name for field in dataclasses.fields(instance) if field.init]
    return {name: _plain(getattr(instance, name)) for name in names}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], allowed: Sequence[str] = ()) -> list[str]:
    """Where nested settings differ, in words; those under `allowed` dotted names may."""
    there, here = _flat(old), _flat(new)
    return [
        f"{name}: {json.dumps(there.get(name))} there, {json.dumps(here.get(name))} here"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name) and not any(f"{name}.".startswith(f"{place}.") for place in allowed)
    ]


def nearest(given: str, allowed: typing.Iterable[str]) -> str:
    """The end of a message about an unknown word: '; did you mean lr? Valid here: lr, eps.'"""
    allowed = list(allowed)
    close = get_close_matches(given, allowed, n=1, cutoff=0.5)
    guess = f"; did you mean {close[0]}?" if close else "."
    return f"{guess} Valid here: {', '.join(allowed) if allowed else '(nothing)'}."


def _checked_mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a section (key: value lines), got {_show(value)}.")
    for key in value:
        if not isinstance(key, str):
            raise ConfigError(f"{where}: the key {key!r} is not text; write it in quotes if it is meant.")
    return value


def _place(where: str, key: str) -> str:
    return f"{where}.{in_one_line(key)}"


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as a `hint`, or a ConfigError that says what was expected at `where`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if origin in (Union, types.UnionType):
        return _convert_union(hint, value, where)
    if origin is Literal:
        for option in args:  # 1 == True == 1.0 in Python, so equality alone would let one pass for the other
            if value == option and type(value) is type(option):
                return option
        raise ConfigError(f"{where}: {_show(value)} is not allowed{nearest(str(value), map(str, args))}")
    if origin in (tuple, list):
        return _convert_sequence(origin, args, value, where)
    if origin is not None and issubclass(origin, Mapping):
        section = _checked_mapping(value, where)
        return {key: _convert(args[1], item, _place(where, key)) for key, item in section.items()}
    if hint in (int, float):
        return _convert_number(hint, value, where)
    expected = {bool: "true or false", str: "text", types.NoneType: "null"}[hint]
    if isinstance(value, hint):
        return value
    quoting = ' (in quotes, for example "7")' if hint is str else ""
    raise ConfigError(f"{where}: expected {expected}{quoting}, got {_show(value)}.")


def _convert_union(hint: Any, value: Any, where: str) -> Any:
    members = [member for member in typing.get_args(hint) if member is not types.NoneType]
    if value is None and types.NoneType in typing.get_args(hint):
        return None
    errors = []
    for member in members:
        try:
            return _convert(member, value, where)
        except ConfigError as error:
            errors.append(error)
    # with a single member its own message is the exact one
    raise errors[0] if len(errors) == 1 else ConfigError(" Or: ".join(str(error) for error in errors))


def _convert_sequence(origin: type, args: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where}: expected a list such as [1, 2], got {_show(value)}.")
    if origin is list or args[-1] is Ellipsis:
        hints = [args[0]] * len(value)
    else:
        hints = list(args)
        if len(value) != len(hints):
            raise ConfigError(f"{where}: expected a list of {len(hints)}, got {len(value)} values.")
    return origin(
        _convert(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True))
    )


def _convert_number(kind: type, value: Any, where: str) -> int | float:
    expected = "a whole number" if kind is int else "a number"
    if isinstance(value, str):
        raise ConfigError(f"{where}: expected {expected}, got the text {value!r}{_number_hint(kind, value)}.")
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise ConfigError(f"{where}: expected {expected}, got {_show(value)}.")
    try:
        number = kind(value)
    except OverflowError:  # a whole number with more than 308 digits, where a float is asked for
        number = math.inf
    if kind is float and not math.isfinite(number):
        raise ConfigError(f"{where}: expected a finite number, got {_show(value)}.")
    return number


def _number_hint(kind: type, text: str) -> str:
    """How YAML 1.1 wants the number written that `text` looks like ("" if it looks like none)."""
    match = re.fullmatch(r"\s*([-+]?)(\d+(?:\.\d*)?|\.\d+)(?:[eE]([-+]?\d+))?\s*", text)
    if match is None:
        return ""
    sign, mantissa, exponent = match.groups()
    if kind is int and float(text).is_integer():
        return f"; write {int(float(text))}"
    if "." not in mantissa:
        mantissa += ".0"
    mantissa = "0" + mantissa if mantissa.startswith(".") else re.sub(r"^0+(?=\d)", "", mantissa)
    if exponent is None:
        return f"; write {sign}{mantissa} without quotes"
    return f"; write {sign}{mantissa}e{int(exponent):+d} (YAML needs the point and the sign to see a number)"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_mapping(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, PurePath) else value


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a section"
    if isinstance(value, list | tuple):
        return "a list"
    names = {str: "the text", bool: "the truth value", int: "the number", float: "the number"}
    kind = names.get(type(value))
    return "nothing (null)" if value is None else f"{kind} {value!r}" if kind else repr(value)


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping from dotted names to values."""
    flat = {}
    for key, value in mapping.items():
        name = f"{prefix}{in_one_line(key)}"
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value
    return flat
