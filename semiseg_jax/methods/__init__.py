"""Building blocks of the methods that label images inside the training step."""
