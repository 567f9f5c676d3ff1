"""Data: sources, split lists, images and masks, augmentation, and the input pipeline."""
