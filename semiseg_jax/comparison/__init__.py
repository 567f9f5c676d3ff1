"""Stages compared on the same images, and the choice of the one whose weights a run keeps."""
