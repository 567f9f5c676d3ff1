"""Your own images: a folder of images, with masks for a few of them. Fill in three lines.

    python -m semiseg_jax.main --config=configs/folder.py

    data/mine/images/street 1.jpg       all images, labelled or not, nested or flat
    data/mine/masks/street 1.png        the existing masks: PNGs whose values are class ids

A fifth of the images with masks is held out for evaluation, unless images/val and masks/val, or
data.evaluation_list, define an evaluation set. docs/data.md describes other layouts, other names
and lists. The network starts from scratch; --config.model.pretrained sets weights of its backbone.

Expected score and time: not measured; they depend on the data.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """Returns a config for one workstation: a mid-sized network, images of any size."""
    config = default.get_config()
    config.data.name = "folder"
    # 1. The folder with images/ and masks/.
    config.data.root = "data/mine"
    # 2. The class names of mask values 0, 1, 2, …; 255 means "no label". For masks of 0 and 255
    #    see docs/data.md.
    config.data.classes = ("background", "object")
    # 3. The number of images with masks to use as labelled images; 0 for all. The other images
    #    are used without their masks.
    config.data.labels = 0.0

    config.data.holdout = 0.2
    config.data.crop = (257, 257)
    config.model.backbone = "efficientnet_lite0"
    # The paper's rates are for features of 49x49; these crops have features of 17x17.
    config.model.aspp_rates = (3, 6, 10)
    config.optim.student.learning_rate = 0.005
    config.train.steps = 3000
    config.train.batch_labeled = 8
    config.train.batch_unlabeled = 8
    config.train.checkpoint_every = 500
    config.rounds.count = 2
    config.rounds.control = True
    # Never worse than without unlabelled images, as far as the held-out images can tell.
    config.rounds.keep = "best_on_holdout"
    return config
