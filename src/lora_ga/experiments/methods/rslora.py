"""rsLoRA (Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023): s = α/√r."""

from lora_ga.experiments.methods import lora
from lora_ga.experiments.methods.base import Method

METHOD = Method(lambda inputs: lora.build(inputs, use_rslora=True), options=lora.METHOD.options)
