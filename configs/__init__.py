"""Configs: default.py declares every key; the others change only what differs."""
