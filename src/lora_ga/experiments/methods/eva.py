"""EVA (Paischer and others, "Parameter Efficient Fine-tuning via Explained Variance Adaptation", 2024).

A is initialised with the leading directions of each layer's inputs. `rho` limits how far ranks may be redistributed
between layers; with 1 they stay equal.
"""

from typing import Any

import torch
from peft import EvaConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.eva import prepare_layer_inputs_fn_language_modeling

from lora_ga.experiments.methods.base import BuildInputs, Method


def layer_inputs(layer_input: Any, model_input: Any, layer_name: str) -> torch.Tensor:
    """PEFT's selection of tokens without padding; a layer after pooling has one vector a row, and nothing to select."""
    first = layer_input if isinstance(layer_input, torch.Tensor) else layer_input[0]
    if first.dim() == 2:
        return first.contiguous()
    return prepare_layer_inputs_fn_language_modeling(layer_input, model_input, layer_name)


def two_sided(layer_input: Any, model_input: Any, layer_name: str) -> torch.Tensor:
    """PEFT has only the encoder's mask; in the decoder, whose targets are one or two words, all tokens count."""
    first = layer_input if isinstance(layer_input, torch.Tensor) else layer_input[0]
    if "decoder" in layer_name.split("."):
        return first.reshape(-1, first.shape[-1])
    return layer_inputs(layer_input, model_input, layer_name)


def build(inputs: BuildInputs) -> Any:
    """Builds the model by PEFT's two calls."""
    # Labels select tokens only if there is one for each token.
    own = EvaConfig(rho=inputs.options["rho"], use_label_mask=inputs.task_type == "CAUSAL_LM")
    config = inputs.lora(init_lora_weights="eva", eva_config=own)
    model = get_peft_model(inputs.base, config)
    layer_inputs_fn = two_sided if inputs.task_type == "SEQ_2_SEQ_LM" else layer_inputs
    initialize_lora_eva_weights(
        model, list(inputs.batches), prepare_layer_inputs_fn=layer_inputs_fn, show_progress_bar=False
    )
    return model


# A larger rho nearly always moves ranks. A stack would find that out only after it has built the model.
METHODS = {"eva": Method(build, options={"rho": 2.0}, alone=lambda options: options["rho"] > 1)}
