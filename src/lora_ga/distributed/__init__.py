"""Several processes: the only users of torch.distributed."""
