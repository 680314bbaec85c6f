"""The Hugging Face boundary: configuration, builders and the model."""

from deq_lm.modeling.configuration_deq_lm import DEQLMConfig, build_config
from deq_lm.modeling.modeling_deq_lm import DEQLMForCausalLM, DEQLMModel, DEQLMOutput

__all__ = ["DEQLMConfig", "DEQLMForCausalLM", "DEQLMModel", "DEQLMOutput", "build_config"]
