"""PiSSA (Meng, Wang, Zhang, 2024): A and B hold the leading singular directions of the weight."""

from peft import get_peft_model

from lora_ga.experiments.methods.base import Method

METHOD = Method(lambda inputs: get_peft_model(inputs.base, inputs.lora(init_lora_weights="pissa")))
