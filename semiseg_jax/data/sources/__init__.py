"""The data sets: where each keeps its images and masks."""
