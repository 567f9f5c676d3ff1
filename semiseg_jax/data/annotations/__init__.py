"""Annotation files of other tools: readers, writers, and what they describe."""
