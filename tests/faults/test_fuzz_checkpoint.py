"""A checkpoint whose hashes are right and whose contents are not: refused by name, with nothing of the run changed."""

import copy
import io
import json
import random
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from fuzzing import fuzz, places, sizes
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_run import make_recipe, make_state

from deq_lm.errors import CheckpointError
from deq_lm.training.checkpoint import damage, newest_complete, restore, save, write_manifest
from deq_lm.training.step import train_step

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
)


class Saved:
    """A run that has been saved after its first step, and is a step further."""

    def __init__(self, folder) -> None:
        self.recipe = make_recipe(folder)
        self.accelerator = Accelerator()
        self.state, self.identity, tokenizer = make_state(self.recipe, self.accelerator)
        self._step()
        self.path = save(folder / "checkpoints", self.state, self.identity, tokenizer, self.accelerator, keep=1)
        self._step()
        self.copy = folder / "copy" / self.path.name

    def _step(self) -> None:
        train_step(self.accelerator, self.state.model, self.state, self.recipe, stop_requested=False)

    def everything(self) -> list[bytes]:
        """All that `restore` may change, as bytes."""
        buffer = io.BytesIO()
        state = self.state
        memory = None if state.memory is None else (state.memory.z, state.memory.x)
        torch.save([state.model.state_dict(), state.optimizer.state_dict(), memory, torch.get_rng_state()], buffer)
        facts = (state.schedule.state_dict(), state.streams.state_dict(), state.progress, state.interval)
        return [buffer.getvalue(), repr(facts).encode(), repr(random.getstate()).encode()]

    @contextmanager
    def altered(self):
        """A copy of the checkpoint to be altered; it is sealed anew, as if it had been written so."""
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.path, self.copy)
        yield self.copy
        write_manifest(self.copy)
        assert damage(self.copy) is None

    def refuses(self, name: str) -> str:
        before = self.everything()
        with pytest.raises(CheckpointError) as caught:
            restore(self.copy, self.state, self.identity, rank=0)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
        assert self.everything() == before
        return str(caught.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return Saved(tmp_path_factory.mktemp("saved"))


def test_an_unaltered_copy_is_restored(saved):
    with saved.altered():
        pass
    before = saved.everything()
    restore(saved.copy, saved.state, saved.identity, rank=0)
    assert saved.everything() != before


@sizes
@pytest.mark.parametrize("name", ["state.json", "rank_00000.json"])
def test_json_of_which_something_is_replaced_or_removed_is_refused_or_read(saved, name, num_inputs):
    original = json.loads((saved.path / name).read_text("utf-8"))

    def check(drawn) -> None:
        place, value, removed = drawn
        mapping = copy.deepcopy(original)
        section = mapping
        for key in place[:-1]:
            section = section[key]
        if removed:
            del section[place[-1]]
        else:
            section[place[-1]] = value
        with saved.altered() as path:
            (path / name).write_text(json.dumps(mapping), encoding="utf-8")
        before, problem = saved.everything(), None
        try:
            restore(saved.copy, saved.state, saved.identity, rank=0)
        except CheckpointError as error:
            problem = str(error)
        if problem is None:
            restore(saved.path, saved.state, saved.identity, rank=0)
        else:
            assert "\n" not in problem
            assert str(saved.copy) in problem
            assert saved.everything() == before

    fuzz(check, st.tuples(st.sampled_from(list(places(original))), values, st.booleans()), min(num_inputs, 600))


@sizes
@pytest.mark.parametrize(
    "name", ["state.json", "rank_00000.json", "rank_00000.safetensors", "model.safetensors", "optimizer.pt"]
)
def test_any_bytes_in_the_place_of_a_file_are_refused(saved, name, num_inputs):
    def check(content: bytes) -> None:
        with saved.altered() as path:
            (path / name).write_bytes(content)
        saved.refuses(name)

    fuzz(check, st.binary(max_size=200), min(num_inputs, 300) // 2)


@sizes
def test_any_damage_is_found_and_the_checkpoint_passed_over(saved, num_inputs):
    files = sorted(path.name for path in saved.path.iterdir())

    def check(drawn) -> None:
        name, place, bit = drawn
        with saved.altered():
            pass
        content = bytearray((saved.copy / name).read_bytes())
        if bit < 8:
            content[place % len(content)] ^= 1 << bit
        else:
            del content[place % len(content) :]
        (saved.copy / name).write_bytes(content)
        if name == "manifest.json":  # some changes leave its meaning as it is
            return
        assert name in (damage(saved.copy) or "")
        with pytest.raises(CheckpointError, match="no checkpoint is complete"):
            newest_complete(saved.copy.parent)

    fuzz(check, st.tuples(st.sampled_from(files), st.integers(0, 2**30), st.integers(0, 8)), min(num_inputs, 500))


def test_a_setting_of_the_model_that_was_not_there_yet_has_its_default(saved):
    def forget(*settings: str) -> None:
        with saved.altered() as path:
            content = json.loads((path / "state.json").read_text("utf-8"))
            config = content["identity"]["model_config"]
            for setting in settings:
                section, _, name = setting.rpartition(".")
                del (config[section] if section else config)[name]
            (path / "state.json").write_text(json.dumps(content), encoding="utf-8")

    forget("embedding", "cell.injection", "stopping.patience")
    restore(saved.copy, saved.state, saved.identity, rank=0)
    forget("cell.dropout")  # which is not 0 here
    assert "cell.dropout: 0.0 there, 0.1 here" in saved.refuses("model_config")


def changed_tensors(tensors: dict, change: str) -> dict:
    name = next(name for name in sorted(tensors) if tensors[name].dim() > 1)
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["extra"] = torch.zeros(2)
    else:
        tensors[name] = tensors[name][:-1].clone()
    return tensors


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_that_are_missing_extra_or_of_another_shape_are_named(saved, change):
    with saved.altered() as path:
        tensors = load_file(path / "model.safetensors")
        name = next(name for name in sorted(tensors) if tensors[name].dim() > 1)
        save_file(changed_tensors(tensors, change), path / "model.safetensors", metadata={"format": "pt"})
    assert ("extra" if change == "extra" else name) in saved.refuses("model.safetensors")


@pytest.mark.parametrize("what", ["groups", "shape", "list"])
def test_an_optimizer_of_another_model_is_refused(saved, what):
    with saved.altered() as path:
        state = torch.load(path / "optimizer.pt", weights_only=True)
        if what == "groups":
            state["param_groups"].pop()
        elif what == "shape":
            state["state"][0]["exp_avg"] = torch.zeros(3, 5)
        else:
            state = [1, 2]
        torch.save(state, path / "optimizer.pt")
    saved.refuses("optimizer.pt")


def test_random_states_of_the_wrong_kind_are_refused(saved):
    with saved.altered() as path:
        tensors = load_file(path / "rank_00000.safetensors")
        tensors["random.torch"] = tensors["random.torch"][:7].clone()
        save_file(tensors, path / "rank_00000.safetensors")
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    saved.refuses("rank_00000.safetensors")
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_memory_of_another_number_of_streams_is_refused(saved):
    with saved.altered() as path:
        tensors = load_file(path / "rank_00000.safetensors")
        for name in ("memory.z", "memory.x"):
            tensors[name] = tensors[name][1:].clone()
        save_file(tensors, path / "rank_00000.safetensors")
    assert "expected 4 streams" in saved.refuses("rank_")


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "model.safetensors", "rank_00000.safetensors", "rank_00000.json", "state.json"]
)
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_in_any_place_is_refused_and_never_executed(saved, name, writer):
    import pickle

    with saved.altered() as path:
        if writer == "torch":
            torch.save({"state": Evil()}, path / name)
        else:
            (path / name).write_bytes(pickle.dumps(Evil()))
    saved.refuses(name)
