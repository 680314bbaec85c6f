"""Does the model read the future? Change each text after a cut of its own and look at the log-probabilities before it.

The equilibrium at t depends on tokens up to t only, but an iterate of a solver whose inner products or stopping rule see
the whole sequence depends on all of them, and a perplexity computed from it has seen what it predicts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deq_lm.errors import DataError
from deq_lm.evaluation.config import EvaluationConfig
from deq_lm.evaluation.modes import device_of, measuring
from deq_lm.evaluation.token_loss import finite
from deq_lm.modeling import DEQLMForCausalLM

CAUSAL_BELOW_NATS = 1e-3
"""Largest change of an earlier log-probability at which a model still counts as causal."""

MAX_SEQUENCES = 8
MAX_LOGITS = 2**25
"""Sequences and logits (128 MiB of them) the audit computes at once."""


@dataclass(frozen=True, kw_only=True)
class CausalityAudit:
    """What the audit found. Changes are of log p, in nats, over the whole vocabulary; None is not finite.

    Attributes:
        max_change_nats: largest change at a position before the cut when the tokens after it were replaced.
        mean_change_nats: mean over these positions of their largest change.
        mean_bias_nats: -log p of the first token after the cut, predicted in the presence of it and what follows less
            predicted from the text before alone: negative where a perplexity is flattered by what it has seen. Rounding
            differs between lengths, so a causal model has nearly 0. Sequences tried at once share the cut of the first of
            them here, so that what is before it is of one length.
        bias_standard_error_nats: of that mean.
        num_cuts: sequences that were tried, each with a cut of its own; every second batch of them has memory before it.
    """

    max_change_nats: float | None
    mean_change_nats: float | None
    mean_bias_nats: float | None
    bias_standard_error_nats: float | None
    num_cuts: int

    @property
    def is_causal(self) -> bool:
        return self.max_change_nats is not None and self.max_change_nats <= CAUSAL_BELOW_NATS


def audit_causality(
    model: DEQLMForCausalLM, tokens: np.ndarray, config: EvaluationConfig, *, seed: int = 0
) -> CausalityAudit:
    """Audit a language model, with the solver and stopping rule it is evaluated with.

    Args:
        model: left as it was found.
        tokens: 1-D; real text, from which sequences are drawn.
        config: segment_length and causality_cuts. The sequences are tried in two batches or more, so that some have
            memory and some have none.
        seed: of the places, cuts and replacements.

    Raises:
        DataError: the text is shorter than two segments of two tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    device = device_of(model)
    length = min(config.segment_length, (len(tokens) - 1) // 2)
    if length < 2:
        raise DataError(f"the text has {len(tokens) - 1} tokens; a causality audit needs at least 4. Give more text.")
    vocab_size = model.config.vocab_size
    half = math.ceil(config.causality_cuts / 2)
    num_sequences = max(1, min(MAX_SEQUENCES, MAX_LOGITS // (length * vocab_size), half))
    changes, biases = [], []
    with measuring(model):
        for i in range(max(2, math.ceil(config.causality_cuts / num_sequences))):
            text = _sequences(tokens, num_sequences, 2 * length, generator).to(device)
            memory = model(text[:, :length], return_logits=False).memory if i % 2 else None
            ids = text[:, length:]
            cuts = torch.randint(1, length, (num_sequences,), generator=generator)
            cut = int(cuts[0])
            shift = torch.randint(1, vocab_size, ids.shape, generator=generator).to(device)
            is_later = (torch.arange(length) >= cuts[:, None]).to(device)  # (B, L)
            changed = torch.where(is_later, (ids + shift) % vocab_size, ids)
            before, after, alone = (
                _log_probabilities(model, inputs, memory) for inputs in (ids, changed, ids[:, :cut])
            )
            changes.append((before - after).abs().amax(dim=-1)[~is_later].double().cpu())  # (sum of cuts,)
            next_token = ids[:, cut, None]  # what the last position before the cut predicts
            biases.append((alone[:, -1] - before[:, cut - 1]).gather(-1, next_token).flatten().double().cpu())  # (B,)
    change, bias = torch.cat(changes), torch.cat(biases)
    return CausalityAudit(
        max_change_nats=finite(float(change.max())),
        mean_change_nats=finite(float(change.mean())),
        mean_bias_nats=finite(float(bias.mean())),
        bias_standard_error_nats=finite(float(bias.std()) / len(bias) ** 0.5),
        num_cuts=len(bias),
    )


def _sequences(tokens: np.ndarray, num_sequences: int, length: int, generator: torch.Generator) -> Tensor:
    """Stretches of the text from random places, (num_sequences, length) int64."""
    starts = torch.randint(len(tokens) - length + 1, (num_sequences,), generator=generator).tolist()
    return torch.from_numpy(np.stack([tokens[start : start + length] for start in starts]).astype(np.int64))


def _log_probabilities(model: DEQLMForCausalLM, ids: Tensor, memory: Any) -> Tensor:
    """log p of every word at every position, (B, L, V)."""
    return model(ids, memory=memory).logits.log_softmax(dim=-1)
