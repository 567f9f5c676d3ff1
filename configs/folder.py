"""Your own images: a folder of them, masks for a few. Three lines to fill.

    python -m semiseg_jax.main --config=configs/folder.py

    data/mine/images/street 1.jpg       every image, labelled or not, in folders or not
    data/mine/masks/street 1.png        the masks there are: PNGs whose values are class ids

A fifth of the images with masks is held out to measure on, unless images/val and masks/val, or
data.evaluation_list, say which. docs/data.md has other layouts, other names and lists. The network
starts from scratch; weights of its backbone go into --config.model.pretrained.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """A middle-sized network, for images of any size, on one workstation."""
    config = default.get_config()
    config.data.name = "folder"
    # 1. The folder with images/ and masks/.
    config.data.root = "data/mine"
    # 2. What the mask values 0, 1, 2, … are called. 255 is no class; for masks of 0 and 255 see
    #    docs/data.md.
    config.data.classes = ("background", "object")
    # 3. How many of the images with masks to use as labelled ones; 0 for all. The others count as
    #    unlabelled then.
    config.data.labels = 0.0

    config.data.holdout = 0.2
    config.data.crop = (257, 257)
    config.model.backbone = "efficientnet_lite0"
    # The paper's rates are for features of 49x49; those of these crops are 17x17.
    config.model.aspp_rates = (3, 6, 10)
    config.optim.student.learning_rate = 0.005
    config.train.steps = 3000
    config.train.batch_labeled = 8
    config.train.batch_unlabeled = 8
    config.train.checkpoint_every = 500
    config.rounds.count = 2
    config.rounds.control = True
    return config
