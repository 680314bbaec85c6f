"""A run that is killed again and again ends as if nothing had been. eval/reliability/kills.py does it 200 times."""

import pytest
from scripts_of_eval import load
from tiny_run import make_recipe


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize(("num_kills", "in_a_write"), [(4, 0), pytest.param(30, 3, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_bits_of_the_uninterrupted_one(tmp_path, num_kills, in_a_write):
    recipe = make_recipe(
        tmp_path,
        "training.max_steps=24",
        "training.schedule.decay_steps=24",
        "training.evaluate_every=8",
        "training.checkpoint_every=3",
    )
    kills = load("reliability/kills")
    counts = kills.run_kills(recipe, num_kills=num_kills, folder=tmp_path, seed=0)
    assert counts.kills == num_kills
    assert counts.kills_in_a_write >= in_a_write  # moments are by chance; tests/training/test_checkpoint.py has each
    assert counts.equal == counts.runs >= 1


def test_a_run_that_fails_by_itself_is_not_taken_for_killed(tmp_path):
    recipe = make_recipe(tmp_path, "training.segment_length=100000")
    kills = load("reliability/kills")
    with pytest.raises(RuntimeError, match="fewer than one segment"):
        kills.run_kills(recipe, num_kills=1, folder=tmp_path, seed=0)
