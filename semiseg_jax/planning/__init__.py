"""Predicts the memory, arithmetic, traffic and time of a run from its compiled programs."""
