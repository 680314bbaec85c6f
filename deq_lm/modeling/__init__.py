"""The Hugging Face boundary: configuration, builders and the model."""

from deq_lm.modeling.cache import EquilibriumCache
from deq_lm.modeling.configuration_deq_lm import DEQLMConfig, build_config
from deq_lm.modeling.modeling_deq_lm import DEQLMForCausalLM, DEQLMModel, DEQLMOutput
from deq_lm.modeling.parameter_count import ParameterCount, count_parameters, matching_stack

__all__ = [
    "DEQLMConfig",
    "DEQLMForCausalLM",
    "DEQLMModel",
    "DEQLMOutput",
    "EquilibriumCache",
    "ParameterCount",
    "build_config",
    "count_parameters",
    "matching_stack",
]
