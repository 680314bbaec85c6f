"""The model card: what a reader of an exported model has to know, from its evaluation and the recipe in it alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from deq_lm.evaluation.report import render
from deq_lm.evaluation.results import EvaluationResult
from deq_lm.evaluation.sample import printable
from deq_lm.evaluation.tables import markdown_table
from deq_lm.modeling import DEQLMConfig, count_parameters

_TEMPLATE = """\
---
{{ card_data }}
---

# {{ model_name }}

{{ kind }} of {{ parameters }} parameters ({{ embedding_parameters }} of them in the embedding), made with deq_lm.
{% if recipe %}
Trained on {{ trained_tokens }} tokens ({{ recipe.training.max_steps }} steps of {{ recipe.training.batch_size }} streams,
{{ recipe.training.gradient_accumulation }} x {{ recipe.training.segment_length }} tokens each) of the corpus \
`{{ recipe.data.corpus }}`, a vocabulary of {{ vocab_size }} entries (tokenizer `{{ recipe.data.tokenizer }}`), seed \
{{ recipe.seed }}.
{% endif %}
{% if not is_causal %}
**Not causal:** its probabilities depend on the text that they predict. The perplexities below are no measure of it.
{% endif %}
## Perplexity

On the {{ split }} split, {{ num_tokens }} tokens, each scored once; memory of {{ mem_len }} positions.

{{ table }}

Perplexity per token compares models of one tokenizer only; per word and bits per byte, any that read the same text. The
bigram (interpolated Kneser-Ney) and the unigram count the training split's tokens.

## Load

```python
import deq_lm  # makes the model known to transformers; no code is loaded with the weights
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

## All that was measured

```text
{{ report }}
```

## Limits

- A language model of this text, and not instructed: it writes what is likely, not what is true or harmless.
- {{ limits }}
- The numbers hold for the length of segments and memory, the solver and the stopping rule given above; another budget of
  evaluations gives others.
"""


def model_card(result: EvaluationResult) -> ModelCard:
    """The card of the model that was measured; all of its numbers are in `result`, or follow from it."""
    config = DEQLMConfig.from_dict(dict(result.model))
    count, recipe, scored = count_parameters(config), result.recipe, result.perplexity
    name = printable(recipe["name"]) if recipe else "deq_lm model"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["deq_lm", "deep-equilibrium-model"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=recipe["data"]["corpus"] if recipe else "unknown",
                dataset_name=recipe["data"]["corpus"] if recipe else "unknown",
                dataset_split=result.split,
                metric_type=metric,
                metric_name=metric.replace("_", " "),
                metric_value=value,
            )
            for metric in ("word_perplexity", "token_perplexity", "bits_per_byte")
            if (value := getattr(scored, metric)) is not None
        ]
        or None,
    )
    return ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        model_name=name,
        kind=_kind(config),
        parameters=f"{count.total:,}",
        embedding_parameters=f"{count.embedding:,}",
        recipe=recipe,
        trained_tokens=f"{_trained_tokens(recipe):,}" if recipe else None,
        vocab_size=f"{config.vocab_size:,}",
        is_causal=result.causality.is_causal,
        split=result.split,
        num_tokens=f"{scored.num_tokens:,}",
        mem_len=result.mem_len,
        table=markdown_table(_rows(result)),
        report=render(replace(result, location=None)),
        limits=_limits(result),
    )


def write_model_card(folder: Path, result: EvaluationResult) -> None:
    """Write README.md in the folder of a model."""
    model_card(result).save(folder / "README.md")


def _kind(config: DEQLMConfig) -> str:
    kinds = {
        "equilibrium": "A deep equilibrium language model: one cell, solved for the state that it leaves unchanged,",
        "unrolled": f"A weight-tied language model of {config.num_layers} layers",
        "stack": f"A Transformer-XL of {config.num_layers} layers",
    }
    return kinds[config.depth]


def _trained_tokens(recipe: Any) -> int:
    training = recipe["training"]
    names = ("max_steps", "batch_size", "gradient_accumulation", "segment_length")
    steps, streams, accumulation, length = (training[name] for name in names)
    return steps * streams * accumulation * length


def _rows(result: EvaluationResult) -> list[dict[str, str]]:
    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    models = {"this model": result.perplexity, "bigram": result.bigram, "unigram": result.unigram}
    return [
        {
            "model": name,
            "perplexity per word": show(perplexity.word_perplexity, ",.2f"),
            "perplexity per token": show(perplexity.token_perplexity, ",.2f"),
            "nats per token": show(perplexity.nats_per_token, ".4f"),
            "bits per byte": show(perplexity.bits_per_byte, ".4f"),
        }
        for name, perplexity in models.items()
    ]


def _limits(result: EvaluationResult) -> str:
    solves = result.solves
    if solves is None or result.model["depth"] != "equilibrium":
        return "Its depth is fixed: nothing is solved."
    return (
        f"{100 * solves.share_converged:.1f} % of the solves met the stopping rule, after {solves.mean_evaluations:.1f} "
        f"evaluations of the cell on average and {solves.max_evaluations} at most."
    )
