"""Several processes, sharded models and tensor-parallel plans: the only package that imports torch.distributed."""
