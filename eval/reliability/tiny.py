"""A recipe whose steps take milliseconds: what is tried here is the run, not the model."""

from __future__ import annotations

from pathlib import Path

from deq_lm.training import Recipe, load_recipe

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "demo_cpu.yaml"

OVERRIDES = (
    "data.vocab_size=512",
    "model.cell={name: transformer_xl, d_model: 32, num_heads: 2, d_inner: 64, mem_len: 16, dropout: 0.1, init_std: 0.2}",
    "training.batch_size=4",
    "training.segment_length=16",
    "training.evaluate_every=null",
    "training.track=false",
    "training.schedule={name: constant, warmup_steps: 10, decay_steps: null, final_lr_ratio: null}",
    "evaluation={batch_size: 64, segment_length: 64, causality_cuts: 1, no_op_segments: 0, curve_evaluations: [], "
    "unroll_depths: [], sample_tokens: 0}",
)


def tiny_recipe(output_dir: Path, *overrides: str) -> Recipe:
    """The demo's recipe with a model of a few thousand weights."""
    return load_recipe(RECIPE, [*OVERRIDES, f"training.output_dir={output_dir}", *overrides])
