"""The two ends of the model at the vocabulary: ids to vectors, hidden states to nats. What the model asks of both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor, nn

Reduction = Literal["sum", "none"]
"""Of the nats of targets, named as in `torch.nn.functional.cross_entropy`."""


class Head(nn.Module):
    """Hidden states to a distribution over the vocabulary.

    Attributes:
        ties: parameters of its own that the model ties to one of the input embedding's, both by name. A head that reads
            the tables of the embedding it is given has none.
    """

    ties: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def nll(
        self, hidden: Tensor, targets: Tensor, embedding: nn.Module, *, reduction: Reduction = "sum"
    ) -> tuple[Tensor, Tensor]:
        """-log p(target) in nats, summed over scored targets, and how many were scored.

        Args:
            hidden: (B, L, D).
            targets: (B, L) int64; -100 is not scored.
            embedding: the input embedding, whose tables the head may share.
            reduction: "none" leaves the nats of each target apart, with 0 where it is not scored.

        Returns:
            The sum, 0-dim, or the nats, (B, L), float32 at least; the count, 0-dim int64.
        """

    @abstractmethod
    def logits(self, hidden: Tensor, embedding: nn.Module) -> Tensor:
        """(B, L, V): log p(word) but for a constant at each position. Arguments as those of `nll`."""


class SelfInitialized(nn.Module):
    """A module that draws its parameters itself, by the functions of `torch.nn.init`; `__init__` does it, too."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw all parameters anew (after construction on the meta device, say)."""


class EmbeddingConfig(ABC):
    """How words are embedded and scored; a subclass is a frozen dataclass of plain data."""

    @abstractmethod
    def check(self, vocab_size: int, d_model: int, *, tied: bool) -> None:
        """Refuse what does not fit the model.

        Args:
            vocab_size: words.
            d_model: width of the hidden states.
            tied: whether input and output share their tables.

        Raises:
            ValueError: saying what would.
        """

    @abstractmethod
    def make_embedding(self, vocab_size: int, d_model: int, *, init_std: float) -> nn.Module:
        """The module from ids, (B, L), to vectors, (B, L, D).

        Args:
            vocab_size: words.
            d_model: D.
            init_std: standard deviation of the initial weights.
        """

    @abstractmethod
    def make_head(self, vocab_size: int, d_model: int, *, init_std: float) -> Head:
        """The head that goes with it; arguments as those of `make_embedding`."""
