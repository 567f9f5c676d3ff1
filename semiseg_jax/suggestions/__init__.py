"""Which unlabelled images to label next, and how corrected labels come back."""
