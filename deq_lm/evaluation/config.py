"""EvaluationConfig: how a model is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The `evaluation` section of a recipe.

    Attributes:
        batch_size: parallel streams a split is cut into, over all processes together. Each starts without context, so
            numbers are comparable at equal batch_size, segment_length and memory only.
        segment_length: tokens per stream and forward pass.
        mem_len: positions of memory a segment may attend to; None is what the model was trained with.
        max_segments: score only so many segments of every stream when validating during training; None scores all. The
            final evaluation always scores all.
        causality_cuts: random sequences that the causality audit cuts, at least, each at a random place of its own; about
            half of them have memory. Two or more are cut in any case.
        no_op_segments: segments of every stream on which the solve is compared with one evaluation of the cell; 0 skips
            the comparison.
        curve_evaluations: evaluations of the cell at which the loss is measured as well, on `max_segments` segments; [] is
            none.
        unroll_depths: evaluations at which the memory of a training step is compared with the unrolled model's.
        sample_prompt: text that the sample continues; empty starts a document.
        sample_tokens: length of the sample; 0 makes none.
        validation_sample_tokens: likewise, of the one drawn at each validation during training.
        sample_temperature: logits are divided by it; 1.0 samples from the model as it is.
    """

    batch_size: int
    segment_length: int
    mem_len: int | None = None
    max_segments: int | None = None
    causality_cuts: int = 200
    no_op_segments: int = 4
    curve_evaluations: tuple[int, ...] = ()
    unroll_depths: tuple[int, ...] = (4, 8, 16, 32)
    sample_prompt: str = ""
    sample_tokens: int = 60
    validation_sample_tokens: int = 20
    sample_temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("batch_size", "segment_length", "causality_cuts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.segment_length < 2:
            raise ValueError("segment_length=1: expected at least 2, the causality audit cuts inside a segment.")
        if self.max_segments is not None and self.max_segments < 1:
            raise ValueError(f"max_segments={self.max_segments}: expected at least 1, or null for all.")
        if self.mem_len is not None and self.mem_len < 0:
            raise ValueError(f"mem_len={self.mem_len}: expected 0 (no memory) or more, or null for the model's own.")
        for name in ("no_op_segments", "sample_tokens", "validation_sample_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 (to leave it out) or more.")
        for name in ("curve_evaluations", "unroll_depths"):
            if any(number < 1 for number in getattr(self, name)):
                raise ValueError(
                    f"{name}={getattr(self, name)}: expected numbers of evaluations, each at least 1; [] leaves them out."
                )
        if self.sample_temperature <= 0:
            raise ValueError(
                f"sample_temperature={self.sample_temperature}: expected more than 0; 1.0 samples from the model as it is."
            )
