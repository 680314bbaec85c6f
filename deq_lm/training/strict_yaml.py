"""YAML without surprises: what a recipe may contain, and nothing that YAML quietly turns into something else.

Only `true`, `false`, `null`, decimal numbers, text, lists and sections are read as such; `no`, `017`, `1:30`,
`.nan`, dates and `1e-3` stay the text they are, so that a typed loader can refuse them by name. Refused here:
a key given twice, anchors and aliases, tags, nesting deeper than `MAX_DEPTH`, more than `MAX_BYTES`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from deq_lm.errors import ConfigError, in_one_line

MAX_BYTES = 1_000_000
MAX_DEPTH = 32


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds.

    Raises:
        ConfigError: the file is missing, too large, not UTF-8, not YAML, or its root is not a section.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give the path of a YAML recipe.") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES:,} bytes; a recipe is a page of text.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8.") from error
    mapping = parse_yaml(text, where=str(path))
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path}: expected sections (key: value lines) at the root of the file.")
    return mapping


def parse_yaml(text: str, where: str) -> Any:
    """The value `text` stands for, or a ConfigError starting with `where` and, if known, the line."""
    try:
        # a SafeLoader that knows less
        return yaml.load(text, Loader=_StrictLoader)  # nosec B506
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise ConfigError(f"{where}:{line} {error.problem or error.context}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}.") from error


class _StrictLoader(yaml.SafeLoader):
    """A SafeLoader that knows fewer spellings and refuses what one page of settings does not need."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own way to declare them

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _refusal(event, "anchors and aliases (& and *) are not allowed; write the value out, or quote it")
        if getattr(event, "tag", None) is not None:
            raise _refusal(event, "tags (!) are not allowed; write a plain value, or quote it")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _refusal(event, f"nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refusal(key, "a key must be text")
            if key.value in seen:
                raise _refusal(key, f"the key {in_one_line(key.value)} is given twice; keep one of them")
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _refusal(at: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


_SPELLINGS = {  # kind: (what it looks like, the characters it may start with)
    "bool": (r"true|false", "tf"),
    "null": (r"null|~|", ["n", "~", ""]),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    "float": (r"[-+]?(?:0|[1-9][0-9_]*)\.[0-9_]*(?:[eE][-+][0-9]+)?", "-+0123456789"),
}
for _kind, (_pattern, _first) in _SPELLINGS.items():
    _regexp = re.compile(f"^(?:{_pattern})$")
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _regexp, list(_first))
