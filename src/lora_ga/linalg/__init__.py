"""Linear algebra of gradients: torch only."""
