"""Deep equilibrium language models. Importing this package makes them known to the Auto classes of transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from deq_lm.modeling import DEQLMConfig, DEQLMForCausalLM, DEQLMModel

__version__ = "0.1.0"
__all__ = ["DEQLMConfig", "DEQLMForCausalLM", "DEQLMModel", "__version__"]

AutoConfig.register(DEQLMConfig.model_type, DEQLMConfig, exist_ok=True)
AutoModel.register(DEQLMConfig, DEQLMModel, exist_ok=True)
AutoModelForCausalLM.register(DEQLMConfig, DEQLMForCausalLM, exist_ok=True)
