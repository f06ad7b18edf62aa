"""Linear algebra of gradients. Imports torch and nothing else of third parties."""
