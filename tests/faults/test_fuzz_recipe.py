"""Whatever stands in a recipe or an override, the answer is a recipe or one line that names the place."""

import copy
import string
import warnings

import pytest
import yaml
from fuzzing import fuzz, places, sizes
from hypothesis import strategies as st
from tiny_run import recipe_mapping

from deq_lm.errors import ConfigError, UnusedSettingWarning
from deq_lm.structure import build
from deq_lm.training import load_recipe
from deq_lm.training.recipe import Recipe

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["1e-3", "no", "017", "1:30", ".nan", "!!python/object/apply:os.system [true]", "&a x", "*a", "\0"]
    )
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@pytest.fixture
def valid(tmp_path):
    return recipe_mapping(tmp_path)


@pytest.fixture
def refused_in_one_line_or_read(tmp_path):
    path = tmp_path / "fuzzed.yaml"

    def check(content: bytes, *overrides: str) -> None:
        path.write_bytes(content)
        problem = ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UnusedSettingWarning)
                load_recipe(path, overrides)
        except ConfigError as error:
            problem = str(error)
        assert "\n" not in problem
        assert len(problem) < 2000

    return check


@sizes
def test_any_bytes(refused_in_one_line_or_read, num_inputs):
    fuzz(refused_in_one_line_or_read, st.binary(max_size=300), num_inputs)


@sizes
def test_any_text_that_looks_like_yaml(refused_in_one_line_or_read, num_inputs):
    letters = st.text(alphabet="ab:{}[]&*!|>-#'\"%@`, \n\t01.e?~\\", max_size=120)
    fuzz(lambda text: refused_in_one_line_or_read(text.encode()), letters, num_inputs)


@sizes
def test_a_recipe_of_which_something_is_replaced_removed_or_added(refused_in_one_line_or_read, valid, num_inputs):
    def check(drawn) -> None:
        place, change, value = drawn
        mapping = copy.deepcopy(valid)
        section = mapping
        for key in place[:-1]:
            section = section[key]
        if change == "remove":
            del section[place[-1]]
        elif change == "replace":
            section[place[-1]] = value
        else:
            section[f"{place[-1]}_"] = value
        refused_in_one_line_or_read(yaml.safe_dump(mapping, allow_unicode=True).encode("utf-8", "surrogatepass"))

    changes = st.tuples(st.sampled_from(list(places(valid))), st.sampled_from(["remove", "replace", "add"]), values)
    fuzz(check, changes, num_inputs)


@sizes
def test_any_override(refused_in_one_line_or_read, valid, num_inputs):
    content = yaml.safe_dump(valid).encode()
    names = st.sampled_from([".".join(place) for place in places(valid)]) | st.text(max_size=12)
    overrides = st.tuples(names, st.text(max_size=30)).map("=".join) | st.text(max_size=30)
    fuzz(lambda override: refused_in_one_line_or_read(content, override), overrides, num_inputs)


def test_deep_nesting_a_bomb_of_aliases_and_a_large_file_are_refused_at_once(refused_in_one_line_or_read, tmp_path):
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    for content in (b"[" * 100_000, b"{a: " * 5000, bomb.encode(), b"# " + b"x" * 2_000_000):
        refused_in_one_line_or_read(content)
        with pytest.raises(ConfigError):
            load_recipe(tmp_path / "fuzzed.yaml")


def misspelt(word: str, letters: str) -> set[str]:
    """What is at distance 1: a letter less, two exchanged, another one, one more."""
    found = set()
    for i in range(len(word) + 1):
        found |= {word[:i] + word[i + 1 :], word[:i] + word[i : i + 2][::-1] + word[i + 2 :]}
        for letter in letters:
            found |= {word[:i] + letter + word[i + 1 :], word[:i] + letter + word[i:]}
    return found - {word, ""}


@pytest.mark.parametrize("letters", ["x", pytest.param(f"{string.ascii_lowercase}_", marks=pytest.mark.slow)])
def test_a_misspelt_key_is_answered_with_the_right_one(valid, letters: str):
    right = total = 0
    for place in places(valid):
        *sections, key = place
        mapping = copy.deepcopy(valid)
        section = mapping
        for name in sections:
            section = section[name]
        value = section.pop(key)
        for wrong in misspelt(key, letters) - {*section, "atol"}:  # which rtol may have been meant for
            section[wrong] = value
            with pytest.raises(ConfigError) as caught:
                build(Recipe, mapping, "recipe")
            del section[wrong]
            total += 1
            right += f"did you mean {key}?" in str(caught.value)
    assert total > 1000
    assert right >= 0.99 * total
