"""First run, on the built-in street scenes: no download, minutes on a laptop.

    make quickstart
    python -m semiseg_jax.main --config=configs/streets.py

Expected score, mIoU in % on the 120 validation scenes, mean and standard deviation over seeds 0, 1
and 2: teacher 38.4 ± 0.2, control 41.8 ± 0.4, second student 45.9 ± 1.1. Expected time of `make
quickstart`: 14 min 3 s on a 2-core machine, installation included. See README.md.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """Returns a small pretrained network; 16 of 480 images labelled, two rounds, the control."""
    config = default.get_config()
    config.data.name = "streets"
    config.data.labels = 16.0
    # The scenes have 96x160 pixels. Enlarged, poles and signs span a pixel of the features.
    config.data.scale = (1.0, 2.0)
    config.data.crop = (96, 144)
    config.eval.scales = (1.5,)
    config.pseudo.scales = (1.5,)
    config.model.backbone = "efficientnet_lite0"
    config.model.pretrained = "imagenet"
    config.model.head_features = 64
    config.model.low_level_features = 24
    # A crop has features of 6x9: larger rates would sample padding only.
    config.model.aspp_rates = (1, 2, 4)
    config.model.dropout = 0.0
    # The head starts from scratch, unlike the backbone, hence its ten times higher rate.
    config.optim.teacher.learning_rate = 0.02
    config.optim.teacher.head_multiplier = 10.0
    config.optim.student.learning_rate = 0.015
    config.train.teacher_steps = 300
    config.train.steps = 200
    config.train.batch_labeled = 8
    config.train.batch_unlabeled = 8
    config.train.log_every = 50
    config.train.checkpoint_every = 100
    config.rounds.count = 2
    config.rounds.control = True
    return config
