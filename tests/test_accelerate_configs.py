"""recipes/accelerate: what Accelerate makes of each file; the CPU one is really launched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env
from tiny_run import recipe_mapping, write_corpus

from deq_lm.training.sharding import EXPECTED

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "recipes" / "accelerate"
EXPECTED_LAUNCH = {
    "gpu_1": ("NO", 1),
    "gpu_8_ddp": ("MULTI_GPU", 8),
    "gpu_8_fsdp2": ("FSDP", 8),
    "cpu_2": ("MULTI_GPU", 2),
}


def test_every_file_is_known_here():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == EXPECTED_LAUNCH.keys()


@pytest.mark.parametrize("name", EXPECTED_LAUNCH)
def test_accelerate_reads_the_file_as_meant(name: str):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes) == EXPECTED_LAUNCH[name]
    assert config.mixed_precision == "no"  # a recipe asks for it
    assert config.use_cpu == (name == "cpu_2")


def test_the_fsdp_file_gives_the_plugin_that_a_run_accepts():
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(FOLDER / "gpu_8_fsdp2.yaml"), str(ROOT / "scripts" / "train_lm.py")]
    )
    arguments, *_ = _validate_launch_command(arguments)
    environment = {name: value for name, value in prepare_multi_gpu_env(arguments).items() if "FSDP" in name}
    with patch_environment(**environment):
        plugin = FullyShardedDataParallelPlugin()
    for name, (expected, _) in EXPECTED.items():
        if name != "offload_params":
            assert getattr(plugin, name) == expected
    assert plugin.cpu_offload is None or type(plugin.cpu_offload).__name__ == "OffloadPolicy"
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert not plugin.transformer_cls_names_to_wrap  # the model names the units itself


def test_two_cpu_processes_are_launched_and_share_a_run(tmp_path):
    recipe = recipe_mapping(tmp_path)
    recipe["training"]["max_steps"] = 2
    recipe["training"]["phases"] = []
    recipe["training"]["schedule"] = {
        "name": "constant",
        "warmup_steps": 0,
        "decay_steps": None,
        "final_lr_ratio": None,
    }
    write_corpus(tmp_path / "text")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / "cpu_2.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    run = subprocess.run(
        [*command, str(ROOT / "scripts" / "train_lm.py"), str(path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "on 2 process(es)" in run.stdout
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    assert (checkpoint / "rank_00001.json").exists()
    assert json.loads((tmp_path / "run" / "final" / "evaluation.json").read_text())["perplexity"]["num_tokens"] > 0
