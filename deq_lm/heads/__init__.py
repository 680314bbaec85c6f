"""From hidden states to nats."""

from deq_lm.heads.linear import token_nll

__all__ = ["token_nll"]
