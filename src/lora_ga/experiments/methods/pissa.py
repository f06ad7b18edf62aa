"""PiSSA (Meng, Wang, Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of LLMs", 2024).

A and B are initialised with the leading singular directions of the weight.
"""

from peft import get_peft_model

from lora_ga.experiments.methods.base import Method

METHOD = Method(lambda inputs: get_peft_model(inputs.base, inputs.lora(init_lora_weights="pissa")))
