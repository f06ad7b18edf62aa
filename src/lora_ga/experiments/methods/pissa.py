"""PiSSA (Meng, Wang, Zhang, 2024): A and B hold the leading singular directions of the weight."""

from peft import get_peft_model

from lora_ga.experiments.methods.base import Method

METHOD = Method(lambda work: get_peft_model(work.base, work.lora(init_lora_weights="pissa")))
