"""A checkpoint that has lost some of its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from deq_lm import DEQLMForCausalLM


def reload_without(model: DEQLMForCausalLM, missing: str, folder: Path) -> tuple[DEQLMForCausalLM, list[str]]:
    """Save a model, take the weights with `missing` in their names away, and load it; with the names.

    All other weights are as they were saved, and those are not.
    """
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    names = [name for name in weights if missing in name]
    assert names
    save_file({n: w for n, w in weights.items() if n not in names}, folder / "model.safetensors", {"format": "pt"})
    loaded = DEQLMForCausalLM.from_pretrained(folder)
    found, expected = dict(loaded.named_parameters()), dict(model.named_parameters())
    assert {name for name in expected if not torch.equal(found[name], expected[name])} == set(names)
    return loaded, names
