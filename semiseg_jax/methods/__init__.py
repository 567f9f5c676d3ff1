"""Methods that label images inside the training step, by name, and their building blocks."""

from semiseg_jax.methods.registry import METHODS

__all__ = ["METHODS"]
