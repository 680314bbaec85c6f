"""A tiny model in float64 whose cell is a contraction, so that every solver finds its one equilibrium."""

from __future__ import annotations

import torch

from deq_lm import DEQLMConfig, DEQLMForCausalLM

VOCABULARY = 23
TIGHT = {"max_steps": 200, "rtol": 1e-12, "patience": 30}


def make(
    *, seed: int = 0, dtype: torch.dtype = torch.float64, cell: dict | None = None, **settings
) -> DEQLMForCausalLM:
    torch.manual_seed(seed)
    width = {"name": "transformer_xl", "d_model": 16, "num_heads": 2, "d_inner": 24, "mem_len": 6, "init_std": 0.3}
    settings = {"stopping": TIGHT, "adjoint": {"name": "implicit", "stopping": TIGHT}, **settings}
    config = DEQLMConfig(vocab_size=VOCABULARY, cell={**width, **(cell or {})}, eos_token_id=0, **settings)
    model = DEQLMForCausalLM(config).to(dtype).eval()
    # Strong injection and weak feedback: a contraction.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= 4.0 if "inject" in name else 0.25 if "qkv" in name else 1.0
    return model
