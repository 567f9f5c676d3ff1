"""Configs: default.py declares every key; the other configs set only the keys that differ."""
