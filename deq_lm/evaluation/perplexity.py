"""Perplexity: nats summed over a split and divided once, by tokens, words or bytes, which are never mixed up."""

from __future__ import annotations

import math
from dataclasses import dataclass

from accelerate import Accelerator

from deq_lm.data.encoding import EncodedSplit
from deq_lm.evaluation.config import EvaluationConfig
from deq_lm.evaluation.modes import remembering
from deq_lm.evaluation.token_loss import SolveStatistics, finite, score_tokens
from deq_lm.modeling import DEQLMForCausalLM


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """A summed loss and what it may be divided by. A quotient is None where it is not finite or not known.

    Attributes:
        nll_nats: the sum of -log p over the scored tokens; None if it is not finite.
        num_tokens: scored tokens.
        num_words: words of the text they spell; None if only part of a split was scored.
        num_bytes: bytes of its UTF-8; likewise.
    """

    nll_nats: float | None
    num_tokens: int
    num_words: int | None
    num_bytes: int | None

    @property
    def nats_per_token(self) -> float | None:
        return self._per(self.num_tokens)

    @property
    def token_perplexity(self) -> float | None:
        """Comparable between models of one tokenizer only."""
        return _exp(self.nats_per_token)

    @property
    def nats_per_word(self) -> float | None:
        return self._per(self.num_words)

    @property
    def word_perplexity(self) -> float | None:
        """exp(nats per word): comparable between tokenizers that cover all of the text."""
        return _exp(self.nats_per_word)

    @property
    def bits_per_byte(self) -> float | None:
        nats = self._per(self.num_bytes)
        return None if nats is None else nats / math.log(2)

    def _per(self, count: int | None) -> float | None:
        return None if self.nll_nats is None or not count else self.nll_nats / count


@dataclass(frozen=True)
class PerplexityResult:
    """What scoring a split gives.

    Attributes:
        perplexity: of the model.
        solves: behind it; None for a model that has none.
        document_nats: the sum over each document of the split; empty where they are not known or not scored entirely.
    """

    perplexity: Perplexity
    solves: SolveStatistics | None
    document_nats: tuple[float, ...] = ()

    def metrics(self) -> dict[str, float | int | None]:
        """The numbers by name, for a training log."""
        numbers = {
            "nats_per_token": self.perplexity.nats_per_token,
            "token_perplexity": self.perplexity.token_perplexity,
            "nats_per_word": self.perplexity.nats_per_word,
            "word_perplexity": self.perplexity.word_perplexity,
            "bits_per_byte": self.perplexity.bits_per_byte,
            "num_tokens": self.perplexity.num_tokens,
        }
        if self.solves is None:
            return numbers
        return {
            **numbers,
            "solver_evaluations": self.solves.mean_evaluations,
            "solver_evaluations_max": self.solves.max_evaluations,
            "solver_residual": self.solves.median_residual,
            "solver_residual_95": self.solves.residual_95,
            "solver_residual_max": self.solves.max_residual,
            "share_converged": self.solves.share_converged,
        }


def evaluate_perplexity(
    model: DEQLMForCausalLM, split: EncodedSplit, config: EvaluationConfig, accelerator: Accelerator | None = None
) -> PerplexityResult:
    """Perplexity of a model on one split: all of it, or the first `config.max_segments` segments of every stream.

    Args:
        model: not wrapped; left as it was found.
        split: what to score.
        config: how.
        accelerator: of a run in several processes, which all call this and all get the same result.

    Raises:
        ConfigError: batch_size cannot be divided among the processes.
    """
    with remembering(model, config.mem_len):
        ends = None if split.documents is None else split.documents.ends
        loss = score_tokens(model, split.tokens, config, accelerator, document_ends=ends)
    whole = loss.num_targets == split.num_tokens
    assert whole or config.max_segments is not None, f"scored {loss.num_targets} of {split.num_tokens} tokens"
    perplexity = Perplexity(
        nll_nats=finite(loss.nll_nats),
        num_tokens=loss.num_targets,
        num_words=split.num_words if whole else None,
        num_bytes=split.num_bytes if whole else None,
    )
    return PerplexityResult(perplexity, loss.solves, loss.document_nats if whole and ends is not None else ())


def _exp(nats: float | None) -> float | None:
    return None if nats is None or nats > 700 else math.exp(nats)
