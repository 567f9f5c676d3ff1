"""First run, on the built-in street scenes: no download, minutes on a laptop."""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """A small network from scratch; 24 of 480 images labelled."""
    config = default.get_config()
    config.data.name = "streets"
    config.data.labels = 24.0
    config.data.crop = (96, 128)
    config.model.backbone = "resnet10_slim"
    config.model.head_features = 64
    config.model.low_level_features = 24
    config.model.aspp_rates = (2, 4, 6)
    config.model.dropout = 0.0
    config.optim.teacher.learning_rate = 0.05
    config.optim.student.learning_rate = 0.05
    config.optim.student.head_multiplier = 1.0
    config.train.steps = 400
    config.train.batch_labeled = 8
    config.train.batch_unlabeled = 8
    config.train.checkpoint_every = 200
    config.rounds.count = 2
    config.rounds.control = True
    return config
