"""The run in tests/golden: its losses and a checkpoint, as the first release wrote them.

`python tests/golden_run.py` writes both anew, which is right only where numbers or the format are meant to change.
"""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tiny_run import make_recipe, make_state, one_step

from deq_lm.training.checkpoint import save
from deq_lm.training.identity import Identity
from deq_lm.training.recipe import Recipe
from deq_lm.training.state import TrainingState

GOLDEN = Path(__file__).resolve().parent / "golden"
CHECKPOINT = GOLDEN / "step_00000005"
STEPS = 20


def begin(folder: Path) -> tuple[Recipe, TrainingState, Identity, Any, Accelerator]:
    """The run before its first step, on one thread."""
    torch.set_num_threads(1)
    recipe = make_recipe(
        folder,
        "data.tokenizer=word_level",
        "data.vocab_size=null",
        "model.cell.d_model=8",
        "model.cell.d_inner=8",
        "model.cell.mem_len=4",
        f"training.max_steps={STEPS}",
        f"training.schedule.decay_steps={STEPS}",
    )
    accelerator = Accelerator()
    state, identity, tokenizer = make_state(recipe, accelerator)
    set_seed(recipe.seed)
    return recipe, state, identity, tokenizer, accelerator


def losses(recipe: Recipe, state: TrainingState, accelerator: Accelerator) -> Iterator[float]:
    """Nats per token of each step from here to the last."""
    while state.progress.step < STEPS:
        before = state.interval.nll_nats, state.interval.num_targets
        one_step(recipe, state, accelerator)
        yield (state.interval.nll_nats - before[0]) / (state.interval.num_targets - before[1])


def this_platform() -> dict[str, str]:
    """What decides the last bits of a sum."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text("utf-8").splitlines() if cpus.exists() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cpu": ", ".join(sorted(names)),
    }


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    GOLDEN.mkdir()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # no path of this machine is kept
        recipe, state, identity, tokenizer, accelerator = begin(Path())
        found = []
        for loss in losses(recipe, state, accelerator):
            found.append(loss)
            if state.progress.step == int(CHECKPOINT.name[5:]):
                save(GOLDEN, state, identity, tokenizer, accelerator, keep=1)
    content = {"platform": this_platform(), "losses": found}
    (GOLDEN / "losses.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
