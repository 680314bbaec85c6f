"""Several processes train as one does: each owns whole streams, and all decide alike."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from processes import launch
from safetensors.torch import load_file
from tiny_run import UNEQUAL, leave_weights_alone, make_recipe, make_state, metrics, signal_at_call
from torch.multiprocessing import ProcessRaisedException

from deq_lm.evaluation import causality, token_loss
from deq_lm.training import checkpoint, step
from deq_lm.training.loop import train
from deq_lm.training.step import train_step

# What forks here starts no threads before it computes on its own.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

SETTINGS = ("training.clip_norm=null", "training.phases=[]", "training.jacobian=null", "model.cell.dropout=0.0")


def gradients(folder: Path) -> None:
    """Save this process's gradient of the second of two steps: it depends on what each stream remembers."""
    AcceleratorState._reset_state(reset_partial_state=True)  # a forked process inherits the parent's
    torch.set_num_threads(1)
    accelerator = Accelerator()
    recipe = make_recipe(folder, *SETTINGS)
    state, *_ = make_state(recipe, accelerator)
    state.model.double()
    model = accelerator.prepare(state.model)
    leave_weights_alone(state)
    train_step(accelerator, model, state, recipe, stop_requested=False)
    for parameter in state.model.parameters():
        parameter.grad.zero_()
    result = train_step(accelerator, model, state, recipe, stop_requested=False)
    grads = {name: parameter.grad for name, parameter in state.model.named_parameters()}
    facts = {
        "norm": result.grad_norm,
        "nats": state.interval.nll_nats,
        "targets": state.interval.num_targets,
    }
    torch.save(grads | facts, folder / f"{accelerator.num_processes}_{accelerator.process_index}.pt")


def test_two_processes_give_the_gradient_of_one(tmp_path):
    make_recipe(tmp_path)  # the corpus, before two processes look for it
    gradients(tmp_path)
    launch(gradients, tmp_path)
    one = torch.load(tmp_path / "1_0.pt")
    for rank in (0, 1):
        other = torch.load(tmp_path / f"2_{rank}.pt")
        assert other.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-12, msg=f"{name} on rank {rank}")


def run(folder: Path, overrides: tuple[str, ...], resume: bool) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    train(make_recipe(folder, *overrides), resume=resume)


def test_a_run_in_two_processes_logs_what_one_logs_and_resumes_bit_for_bit(tmp_path):
    make_recipe(tmp_path)
    short = (*SETTINGS, "training.max_steps=4", "training.evaluate_every=null")
    overrides = {name: (f"training.output_dir={tmp_path / name}", *short) for name in ("one", "two")}
    train(make_recipe(tmp_path, *overrides["one"]))
    launch(run, tmp_path, overrides["two"], False)
    one, two = (make_recipe(tmp_path, *overrides[name]) for name in ("one", "two"))
    for kind, name in (("train", "loss"), ("train", "solver_evaluations"), ("test", "nats_per_token")):
        values, others = ([line[name] for line in metrics(recipe, kind)] for recipe in (one, two))
        assert len(values) > 0
        assert values == pytest.approx(others, rel=1e-4)

    again = (f"training.output_dir={tmp_path / 'again'}", *short)
    launch(run, tmp_path, (*again, "training.max_steps=2"), False)
    launch(run, tmp_path, again, True)
    for name in ("model.safetensors", "rank_00000.safetensors", "rank_00001.safetensors", "optimizer.pt"):
        first, second = (tmp_path / folder / "checkpoints" / "step_00000004" / name for folder in ("two", "again"))
        assert first.read_bytes() == second.read_bytes()


BROKEN_OFF = (  # process, what it is doing when it is to stop, for which time; and which measurements are done by then
    (1, token_loss, "without_padding", 3, []),
    (0, token_loss, "without_padding", 10, ["valid"]),
    (0, causality, "_log_probabilities", 2, ["valid"]),
)


def broken_off(folder: Path, overrides: tuple[str, ...]) -> None:
    """Run on, and be stopped as often as `BROKEN_OFF` says."""
    recipe = make_recipe(folder, *overrides)
    for i, (rank, module, name, number, done) in enumerate(BROKEN_OFF):
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_num_threads(1)
        with pytest.MonkeyPatch.context() as patch:
            if Accelerator().process_index == rank:
                signal_at_call(patch, module, name, number)
            assert train(recipe, resume=i > 0) == signal.SIGTERM
        torch.distributed.barrier()  # the first process still has the folder locked
        assert [kind for kind in ("valid", "test") if metrics(recipe, kind)] == done


def test_all_processes_break_off_a_measurement_if_one_must(tmp_path):
    make_recipe(tmp_path)
    short = (*SETTINGS, "training.max_steps=2", "training.evaluate_every=2")
    overrides = {name: (f"training.output_dir={tmp_path / name}", *short) for name in ("whole", "again")}
    launch(run, tmp_path, overrides["whole"], False)
    launch(broken_off, tmp_path, overrides["again"])
    launch(run, tmp_path, overrides["again"], True)
    whole, again = (make_recipe(tmp_path, *overrides[name]) for name in ("whole", "again"))
    for kind in ("train", "valid", "test"):
        lines, others = (
            [{k: v for k, v in line.items() if k not in UNEQUAL} for line in metrics(r, kind)] for r in (whole, again)
        )
        assert len(lines) > 0
        assert lines == others


def test_each_process_draws_its_own_budgets_and_draws_on_when_resumed(tmp_path):
    make_recipe(tmp_path)
    settings = (
        "model.stopping={max_steps: 6, rtol: 0.0, patience: null}",
        "training.phases=[{until: 0.25, num_unrolled_steps: 2}, {until: 0.5, max_steps: 4, adjoint: {name: phantom}}]",
        "training.max_steps_jitter=3",
        "training.faults.unconverged_adjoint.policy=ignore",
        "training.evaluate_every=null",
        "training.checkpoint_every=1",
        "training.keep_checkpoints=8",
        "training.log_every=100",  # so that an interval, which a checkpoint keeps, has all evaluations
    )
    whole, again = ((f"training.output_dir={tmp_path / name}", *settings) for name in ("whole", "again"))
    launch(run, tmp_path, whole, False)
    launch(run, tmp_path, (*again, "training.max_steps=3"), False)
    launch(run, tmp_path, again, True)
    for name in ("model.safetensors", "rank_00000.safetensors", "rank_00001.safetensors", "optimizer.pt"):
        first, second = (tmp_path / folder / "checkpoints" / "step_00000008" / name for folder in ("whole", "again"))
        assert first.read_bytes() == second.read_bytes(), name
    budgets = []
    for rank in (0, 1):
        evaluations, others = (
            json.loads((tmp_path / folder / "checkpoints" / "step_00000008" / f"rank_0000{rank}.json").read_text())[
                "interval"
            ]["solver_evaluations"]
            for folder in ("whole", "again")
        )
        assert evaluations == others
        steps = [set(evaluations[i : i + 4]) for i in range(0, len(evaluations), 4)]  # 2 segments of 2 streams each
        assert len(steps) == 6  # the shallow ones have no solve
        assert all(len(found) == 1 for found in steps)  # one draw a step
        budgets.append([found.pop() - 1 for found in steps])
        assert all(1 <= budget <= 4 for budget in budgets[-1][:2])
        assert all(3 <= budget <= 6 for budget in budgets[-1][2:])
        assert len(set(budgets[-1][2:])) > 1
    assert budgets[0] != budgets[1]


def skip(folder: Path) -> None:
    """One process's loss is not finite; record what each process did about it, and a checkpoint of both."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    accelerator = Accelerator()
    recipe = make_recipe(folder, *SETTINGS)
    state, identity, tokenizer = make_state(recipe, accelerator)
    model, state.optimizer = accelerator.prepare(state.model, state.optimizer)
    train_step(accelerator, model, state, recipe, stop_requested=accelerator.process_index == 1)
    checkpoint.save(folder / "checkpoints", state, identity, tokenizer, accelerator, keep=1)
    before = [parameter.clone() for parameter in state.model.parameters()]
    if accelerator.process_index == 1:
        forward = state.model.forward

        def infinite(*args, **kwargs):
            output = forward(*args, **kwargs)
            output.nll_nats = output.nll_nats + float("inf")
            return output

        state.model.forward = infinite
    result = train_step(accelerator, model, state, recipe, stop_requested=accelerator.process_index == 1)
    unchanged = all(a.equal(b) for a, b in zip(before, state.model.parameters(), strict=True))
    facts = {"faults": result.faults, "interrupted": result.interrupted, "unchanged": unchanged}
    # what rank 1 remembers is another part of the text; each process finds its own again
    checkpoint.restore(
        checkpoint.newest_complete(folder / "checkpoints"), state, identity, rank=accelerator.process_index
    )
    torch.save(
        facts | {"memory": state.memory.x, "step": state.progress.step}, folder / f"{accelerator.process_index}.pt"
    )


def skip_unconverged(folder: Path, policy: str) -> None:
    """One process's adjoint solve is reported as unconverged; record what each process did about it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    accelerator = Accelerator()
    recipe = make_recipe(folder, *SETTINGS, f"training.faults.unconverged_adjoint={{policy: {policy}, limit: 0.5}}")
    state, *_ = make_state(recipe, accelerator)
    model, state.optimizer = accelerator.prepare(state.model, state.optimizer)
    facts_of = step.facts_of

    def unconverged(solution, **kwargs):
        facts = facts_of(solution, **kwargs)
        if solution is state.model.adjoint_solution:
            facts["residuals"] = torch.tensor([0.75, 0.25])
        return facts

    facts = {}
    for name in ("converged", "unconverged"):
        if name == "unconverged" and accelerator.process_index == 1:
            step.facts_of = unconverged
        before = [parameter.clone() for parameter in state.model.parameters()]
        result = train_step(accelerator, model, state, recipe, stop_requested=False)
        same = all(a.equal(b) for a, b in zip(before, state.model.parameters(), strict=True))
        facts[name] = (result.faults, same, state.progress.account.num_skipped)
        facts[f"{name} records"] = result.records
    torch.save(facts | {"memory": state.memory is not None}, folder / f"unconverged_{accelerator.process_index}.pt")


@pytest.mark.parametrize("policy", ["skip", "retry"])
def test_all_processes_skip_if_one_has_an_unconverged_adjoint_and_know_its_residual(tmp_path, policy):
    make_recipe(tmp_path)
    launch(skip_unconverged, tmp_path, policy)
    first, second = (torch.load(tmp_path / f"unconverged_{rank}.pt") for rank in (0, 1))
    assert first == second
    assert first["converged"][::2] == ({}, 0)
    assert first["unconverged"] == ({"unconverged_adjoint": 0.75}, True, 1)
    *again, record = first["unconverged records"]
    assert [earlier["policy"] for earlier in again] == (["retry"] if policy == "retry" else [])
    # two segments a step, of which this is the second; the two streams of rank 1 are 2 and 3, and the first is to blame
    assert (record["policy"], record["epoch"], record["segment"]) == ("skip", 0, 2)
    assert record["worst_solve"] == {"residual": 0.75, "segment": 0, "stream": 2}
    assert first["memory"]


@pytest.fixture(scope="module")
def skipped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("skip")
    make_recipe(folder)
    launch(skip, folder)
    return folder


def test_all_processes_skip_and_stop_if_one_must(skipped):
    for rank in (0, 1):
        facts = torch.load(skipped / f"{rank}.pt")
        assert facts["faults"] == {"not_finite": None}
        assert facts["unchanged"]
        assert facts["interrupted"]


def test_each_process_restores_its_own_memory(skipped):
    first, second = (torch.load(skipped / f"{rank}.pt") for rank in (0, 1))
    assert first["step"] == second["step"] == 1
    assert first["memory"].shape == (2, 8, 16)
    assert not first["memory"].equal(second["memory"])


def test_another_number_of_processes_that_the_streams_cannot_be_dealt_to_is_refused(tmp_path):
    make_recipe(tmp_path)
    with pytest.raises(ProcessRaisedException, match="num_streams=4 cannot be shared out evenly among 3 processes"):
        launch(run, tmp_path, ("evaluation.batch_size=3",), False, num_processes=3)


def test_streams_of_evaluation_that_cannot_be_dealt_are_refused_before_anything_is_written(tmp_path):
    make_recipe(tmp_path)
    with pytest.raises(ProcessRaisedException, match=r"evaluation\.batch_size=3 cannot be shared out evenly among 2"):
        launch(run, tmp_path, ("evaluation.batch_size=3",), False)
    assert not (tmp_path / "run").exists()


def weights_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def test_a_run_goes_on_in_another_number_of_processes(tmp_path, caplog):
    settings = (*SETTINGS, "training.evaluate_every=null", "training.checkpoint_every=20", "training.log_every=6")
    settings += ("training.max_steps=20", "training.schedule.decay_steps=20", "model.cell.init_std=0.2")
    settings += ("model.stopping={max_steps: 60, rtol: 1.0e-5}", "training.faults.unconverged_adjoint.policy=ignore")
    settings += ("model.adjoint={name: implicit, stopping: {max_steps: 60, rtol: 1.0e-5}}",)
    whole, dealt = ((f"training.output_dir={tmp_path / name}", *settings) for name in ("whole", "dealt"))
    train(make_recipe(tmp_path, *whole))
    train(make_recipe(tmp_path, *dealt, "training.max_steps=7"))  # in the middle of what makes a line of metrics
    launch(run, tmp_path, (*dealt, "training.max_steps=14"), True)
    with caplog.at_level("WARNING"):
        train(make_recipe(tmp_path, *dealt), resume=True)
    assert "written by 2 process(es), and this run has 1" in caplog.text
    lines, others = (metrics(make_recipe(tmp_path, *overrides), "train") for overrides in (whole, dealt))
    assert [line["step"] for line in others] == [line["step"] for line in lines] == [6, 12, 18]
    for line, other in zip(lines, others, strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-4)
        assert other["solver_evaluations"] == pytest.approx(line["solver_evaluations"], rel=0.05)
    weights = [weights_of(tmp_path / name, 20) for name in ("whole", "dealt")]
    for name, weight in weights[0].items():
        assert torch.dist(weights[1][name], weight) <= 1e-3 * weight.norm(), name


def remembered(folder: Path) -> None:
    """Each of two processes restores what one wrote, and leaves its memory and its next segment."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    accelerator = Accelerator()
    state, identity, _ = make_state(make_recipe(folder, *SETTINGS), accelerator)
    rank = accelerator.process_index
    checkpoint.restore(checkpoint.newest_complete(folder / "checkpoints"), state, identity, rank=rank)
    facts = {"memory": state.memory.x, "next": state.streams.next_segment().input_ids, "draw": torch.rand(1)}
    torch.save(facts, folder / f"remembered_{rank}.pt")


def test_every_stream_keeps_its_memory_and_its_place_in_the_text(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    accelerator = Accelerator()
    recipe = make_recipe(tmp_path, *SETTINGS)
    state, identity, tokenizer = make_state(recipe, accelerator)
    train_step(accelerator, state.model, state, recipe, stop_requested=False)
    checkpoint.save(tmp_path / "checkpoints", state, identity, tokenizer, accelerator, keep=1)
    launch(remembered, tmp_path)
    first, second = (torch.load(tmp_path / f"remembered_{rank}.pt") for rank in (0, 1))
    assert torch.cat([first["memory"], second["memory"]]).equal(state.memory.x)
    assert torch.cat([first["next"], second["next"]]).equal(state.streams.next_segment().input_ids)
    assert not first["draw"].equal(second["draw"])


def wait_for_the_other_that_does_not_come() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator()
    if accelerator.process_index == 0:
        accelerator.wait_for_everyone()
    else:
        time.sleep(60)


def test_processes_that_wait_for_each_other_for_ever_are_killed():
    with pytest.raises(TimeoutError, match="2 processes have not ended"):
        launch(wait_for_the_other_that_does_not_come, seconds=3)
