"""Run a script under Accelerate on the CPU, with FSDP or DeepSpeed: python on_cpu.py SCRIPT ARGUMENTS.

FSDP and DeepSpeed also run on CPUs, over gloo, but Accelerate uses them on accelerators only. This script therefore
makes Accelerate treat the CPU as an accelerator.
"""

import os
import runpy
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
