"""Models small enough to know the answer of, and one real model."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deq_lm.data.encoding import EncodedSplit
from deq_lm.evaluation import EvaluationConfig
from deq_lm.modeling import DEQLMConfig, DEQLMForCausalLM
from deq_lm.solvers import Picard, StoppingRule, solve

VOCABULARY = 23


class TableModel(nn.Module):
    """p(w|v) from a table; solves z = z / 2 beside it, so that there is a solution to report."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(logits.double())  # (V, V), row v
        self.config = SimpleNamespace(vocab_size=len(logits), depth="equilibrium")

    def logits_of(self, input_ids: Tensor) -> Tensor:
        return self.table[input_ids]

    def forward(
        self, input_ids, *, targets=None, memory=None, stopping=None, return_logits=True, return_target_nats=False
    ):
        logits = self.logits_of(input_ids)
        output = SimpleNamespace(logits=logits, memory=None, nll_nats=None, num_targets=None)
        output.solution = solve(lambda z: z / 2, torch.ones(*input_ids.shape, 1), solver=Picard(), stopping=stopping)
        if targets is not None:
            scored = targets != -100
            nll = -logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
            output.target_nats, output.num_targets = torch.where(scored, nll, 0.0), scored.sum()
            output.nll_nats = output.target_nats.sum()
        return output


@pytest.fixture
def table_model():
    """A factory of TableModel, by default with a random table."""

    def make(logits: Tensor | None = None) -> TableModel:
        generator = torch.Generator().manual_seed(0)
        return TableModel(torch.randn(VOCABULARY, VOCABULARY, generator=generator) if logits is None else logits)

    return make


@pytest.fixture
def deq_model():
    """A factory of tiny models of the real kind, in float64, eager to use their state."""

    def make(*, dtype: torch.dtype = torch.float64, cell: dict | None = None, **settings) -> DEQLMForCausalLM:
        torch.manual_seed(0)
        sizes = {"name": "transformer_xl", "d_model": 16, "num_heads": 2, "d_inner": 24, "mem_len": 6, "init_std": 0.3}
        stopping = {"max_steps": 30, "rtol": 1e-6}
        settings = {"stopping": stopping, "adjoint": {"name": "implicit", "stopping": stopping}, **settings}
        config = DEQLMConfig(vocab_size=VOCABULARY, cell={**sizes, **(cell or {})}, eos_token_id=0, **settings)
        return DEQLMForCausalLM(config).to(dtype).eval()

    return make


@pytest.fixture
def make_split():
    """A factory of splits of random tokens."""

    def make(num_tokens: int, *, vocab_size: int = VOCABULARY, seed: int = 0) -> EncodedSplit:
        tokens = np.random.default_rng(seed).integers(vocab_size, size=num_tokens + 1).astype(np.uint16)
        return EncodedSplit(tokens=tokens, num_words=num_tokens // 2, num_bytes=num_tokens * 3)

    return make


@pytest.fixture
def config() -> EvaluationConfig:
    return EvaluationConfig(batch_size=3, segment_length=8)


@pytest.fixture
def fixed_steps():
    """A stopping rule's mapping for exactly so many steps."""

    def make(num_steps: int) -> dict:
        rule = StoppingRule.fixed(num_steps)
        return {"max_steps": rule.max_steps, "rtol": 0.0, "patience": None, "divergence_factor": None}

    return make
