"""From an estimate to an adapter: plan, write, save, load."""
