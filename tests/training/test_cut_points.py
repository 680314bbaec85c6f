"""Wherever a run is cut, what is resumed is the run that was not cut: every later checkpoint is equal in every bit.

Dropout and the Jacobian's estimate are on, so that all random numbers have to come back too.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from processes import launch
from tiny_run import forward_changed, make_recipe, not_finite

from deq_lm.training import loop
from deq_lm.training.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

STEPS, EVALUATED, SKIPPED, EPOCH_END = 8, 4, 6, 5
KEPT = {
    "nothing was saved yet": 0,
    "the first step": 1,
    "the middle of an epoch": 2,
    "the end of an epoch": EPOCH_END,
    "an evaluation": EVALUATED,
    "a step without an update": SKIPPED,
    "the last step": STEPS,
}
"""What a run is cut after: the newest checkpoint that is left."""
KILLED = ("the first of a step's segments", "half an evaluation")


class Killed(BaseException):
    """Like a kill, nothing of ours catches it."""


def recipe_in(folder: Path, name: str) -> Recipe:
    return make_recipe(
        folder,
        f"training.output_dir={folder / name}",
        f"training.max_steps={STEPS}",
        "training.segment_length=36",
        f"training.evaluate_every={EVALUATED}",
        "training.checkpoint_every=1",
        f"training.keep_checkpoints={STEPS}",
    )


def train(recipe: Recipe, *, resume: bool, killed_after: str | None = None) -> None:
    """`loop.train` without the report at its end, with a loss that is not finite in one step."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)

    def step(accelerator, model, state, *arguments, **options):
        number, calls = state.progress.step + 1, []

        def change(output, kwargs):
            calls.append(1)
            if killed_after == KILLED[0] and number == 3 and len(calls) == 2:
                raise Killed
            if number == SKIPPED:
                not_finite(output, kwargs)

        with forward_changed(state.model, change):
            return original(accelerator, model, state, *arguments, **options)

    def evaluate(*_, **__):
        raise Killed

    original = loop.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        patch.setattr(loop, "final_report", lambda *_: None)
        if killed_after == KILLED[1]:
            patch.setattr(loop, "validate", evaluate)
        try:
            assert loop.train(recipe, resume=resume) is None
        except Killed:
            assert killed_after is not None


def wait_for_all() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def cut_and_resume(folder: Path) -> None:
    """The uninterrupted run, and for each place another one that was cut there; in each of the processes."""
    whole = recipe_in(folder, "whole")
    train(whole, resume=False)
    for place, step in KEPT.items():
        cut = recipe_in(folder, place)
        output = Path(cut.training.output_dir)
        wait_for_all()
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            shutil.copytree(whole.training.output_dir, output)
            for path in (output / "checkpoints").iterdir():
                if int(path.name[5:]) > step:
                    shutil.rmtree(path)
        wait_for_all()
        train(cut, resume=True)
    for place in KILLED:
        train(recipe_in(folder, place), resume=False, killed_after=place)
        wait_for_all()  # the first process still has the folder locked
        train(recipe_in(folder, place), resume=True)


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def runs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    make_recipe(folder)  # the corpus, before two processes look for it
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        if request.param == 1:
            cut_and_resume(folder)
        else:
            launch(cut_and_resume, folder)
    return folder


def facts(checkpoint: Path) -> dict[str, object]:
    """All of a checkpoint but what names its run and what depends on the clock."""
    found: dict[str, object] = {}
    for path in sorted(checkpoint.iterdir()):
        if path.name == "state.json":
            state = json.loads(path.read_text("utf-8"))
            found[path.name] = state["progress"], state["schedule"]
        elif path.name.startswith("rank_") and path.suffix == ".json":
            own = json.loads(path.read_text("utf-8"))
            found[path.name] = own["streams"], own["random"]
        elif path.name != "manifest.json":
            found[path.name] = path.read_bytes()
    return found


@pytest.mark.parametrize("place", [*KEPT, *KILLED])
def test_a_run_that_was_cut_after_this_is_the_uninterrupted_one_in_every_bit(runs, place):
    for step in range(1, STEPS + 1):
        name = f"checkpoints/step_{step:08d}"
        whole, cut = facts(runs / "whole" / name), facts(runs / place / name)
        assert whole.keys() == cut.keys()
        assert [file for file in whole if whole[file] != cut[file]] == []


def test_the_places_are_what_they_are_called(runs):
    def read(step: int, name: str):
        return json.loads((runs / "whole" / f"checkpoints/step_{step:08d}" / name).read_text("utf-8"))

    assert read(2, "rank_00000.json")["streams"] == {"epoch": 0, "segment": 4}
    assert read(EPOCH_END, "rank_00000.json")["streams"] == {"epoch": 1, "segment": 0}
    assert read(EVALUATED, "state.json")["progress"]["best_step"] == EVALUATED
    assert read(SKIPPED, "state.json")["progress"]["num_skipped_in_a_row"] == 1
