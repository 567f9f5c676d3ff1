"""Data: sources, splits, labels, augmentation, and the pipeline that joins them."""
