"""Every exception and warning deq_lm raises on purpose, and their one line.

A caller's mistake is a `ValueError` (these are subclasses, so that a script can print them as one line); the outcome of
a solve is a value, `deq_lm.solvers.Outcome`, and becomes an exception only where a policy asks for one.
"""


class ConfigError(ValueError):
    """A recipe, configuration or override is wrong: what was given, what is allowed, what to do."""


class DataError(ValueError):
    """A corpus, tokenizer or encoded file is missing, empty or unreadable."""


class CheckpointError(ValueError):
    """A checkpoint or run folder is damaged, belongs to another model, or is in the way."""


class Interrupted(Exception):  # no mistake, and no outcome of ours: a request
    """A signal asks for the end of what is being measured."""


class SolveError(RuntimeError):
    """A solve did not converge and the policy is to raise."""


class ConvergenceWarning(UserWarning):
    """A solve did not converge and the policy is to warn."""


class ReversalWarning(UserWarning):
    """A solve run backwards did not come back to its start: its gradient is inaccurate."""


class UnusedSettingWarning(UserWarning):
    """A setting was given that has no effect in this configuration."""


def in_one_line(text: str) -> str:
    """`text` with every character that would break the line or steer a terminal written as an escape.

    Messages show what was given, and a path or a key may hold anything.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
