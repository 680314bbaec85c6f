"""The YAML a recipe may be written in."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deq_lm.errors import ConfigError
from deq_lm.training.strict_yaml import MAX_BYTES, MAX_DEPTH, parse_yaml, read_yaml


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "recipe.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("-3", -3),
        ("0.5", 0.5),
        ("1.0e-3", 1e-3),
        ("true", True),
        ("null", None),
        ("", None),
        ("a/b.txt", "a/b.txt"),
        ("[0.9, 0.95]", [0.9, 0.95]),
        ("{a: 1, b: {c: x}}", {"a": 1, "b": {"c": "x"}}),
        ("'12'", "12"),
    ],
)
def test_plain_settings_are_read_as_what_they_are(text, value):
    assert parse_yaml(text, "x") == value
    assert type(parse_yaml(text, "x")) is type(value)


@pytest.mark.parametrize(
    "text", ["no", "Yes", "on", "True", "017", "0x1F", "1:30", ".nan", ".inf", "2024-01-31", "1e-3", "<<", "NULL"]
)
def test_spellings_that_yaml_would_turn_into_something_else_stay_text(text):
    assert parse_yaml(text, "x") == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: the key a is given twice"),
        ("a: {b: 1, b: 2}", "line 1: the key b is given twice"),
        ("a: &x 1", "anchors and aliases"),
        ("a: *x", "anchors and aliases"),
        ("a: !!python/object/apply:os.system [ls]", "tags"),
        ("a: !!timestamp 2024-01-31", "tags"),
        ("? [a]\n: 1", "a key must be text"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), f"deeper than {MAX_DEPTH}"),
        ("[" * 5000, "deeper than"),
        ("a: b: c", "line 1"),
        ("a: [1", "line 1"),
        ("a: 1\n---\nb: 2", "document"),
        ("9" * 5000, "limit"),
        ("a\0b", "#x0000"),
    ],
)
def test_what_one_page_of_settings_does_not_need_is_refused(text, words):
    message = refusal(text)
    assert message.startswith("recipe.yaml:")
    assert words in message


def test_nesting_up_to_the_limit_is_read():
    assert parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x")


@settings(deadline=None)
@given(st.text(alphabet="ab:-[]{}&*!?<>|#%@'\",.\n 01e~", max_size=30))
def test_any_text_is_read_or_refused_with_a_config_error(text):
    try:
        parse_yaml(text, "x")
    except ConfigError:
        refusal(text)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: \xff\n", "byte 3 is not UTF-8"),
        (b"- 1\n- 2\n", "expected sections"),
        (b"", "expected sections"),
        (b"a: " + b"x" * MAX_BYTES, "larger than"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="directory"):
        read_yaml(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(path) == {"a": 1}
