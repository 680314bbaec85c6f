"""How the model takes part in transformers' `generate`: prompts are checked, the cache is its own, the text slides."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from deq_lm.cells.memory import Past
from deq_lm.modeling.cache import EquilibriumCache
from deq_lm.modeling.inputs import check_inputs, mask_of_new, unknown_id


class EquilibriumGenerationMixin(GenerationMixin):
    """The library's generation, of a model that solves for one position a token."""

    def generate(self: Any, inputs: Tensor | None = None, *arguments: Any, **options: Any) -> Any:
        """As the library's; a new token is a solve over its own position, which begins where those of training do.

        Every token sees the `mem_len` tokens before it, the prompt's, too, or all of them in a model without memory.
        `max_evaluations` is the compute a token may take, and `past_key_values=EquilibriumCache()` tells what each took.
        `use_cache=False` solves the whole text anew for every token, and is all that an unrolled model can.

        Raises:
            ValueError: for an empty prompt, ids outside the vocabulary, a mask of another length, or a cache of another
                kind or text.
        """
        ids = options.get("input_ids") if inputs is None else inputs
        if ids is not None:
            check_inputs(ids, None, None)
            if ((ids < 0) | (ids >= self.config.vocab_size)).any():
                raise unknown_id("input_ids", ids, self.config.vocab_size)
            cache, mask = options.get("past_key_values"), options.get("attention_mask")
            num_past = cache.get_seq_length() if isinstance(cache, EquilibriumCache) else 0
            mask_of_new(mask, ids, num_past)  # the library would cut a longer one
            whole_text = mask is None or mask.shape[1] == ids.shape[1]  # otherwise these are the new tokens only
            if isinstance(cache, EquilibriumCache) and whole_text:
                cache.check_text(ids)
        return super().generate(inputs, *arguments, **options)  # pyright: ignore[reportAttributeAccessIssue]

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self: Any, input_ids: Tensor, *, past_key_values: Any = None, memory: Past | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The library's, for a text that slides; a memory is the past of its first token only."""
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            memory = None
        kwargs.pop("tokenizer", None)  # the library needs it for stop_strings, and hands it on
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids, past_key_values=past_key_values, **kwargs
        )
        return {**inputs, "memory": memory, "sliding": True}

    def _prepare_cache_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any
    ) -> None:
        """Makes the cache in place of the library, whose own ones hold keys and values of several layers."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: expected none; the model makes an "
                "EquilibriumCache. Leave it out."
            )
        if model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"]._is_user_defined = True  # the library's mark
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = EquilibriumCache()
