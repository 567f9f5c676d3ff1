"""Use of a trained model: prediction, tiling and export."""
