"""Your own images: a folder of images, with masks for a few of them. Fill in three lines.

    python -m semiseg_jax.main --config=configs/folder.py

    data/mine/images/street 1.jpg       all images, labelled or not, nested or flat
    data/mine/masks/street 1.png        the existing masks: PNGs whose values are class ids

A fifth of the images with masks is held out for evaluation, unless images/val and masks/val, or
data.evaluation_list, define an evaluation set. docs/data.md describes other layouts, other names
and lists.

The backbone starts from ImageNet weights installed with this package (docs/networks.md); with
--config.model.pretrained= it starts from scratch. Downscaling, crop, scales and dilation rates are
chosen from the sizes of the images at the first start, which logs them.

    python -m semiseg_jax.main --config=configs/folder.py:dinov2_s
    python -m semiseg_jax.main --config=configs/folder.py:dinov2_s_frozen

With dinov2_s the network is the vision transformer DINOv2-S, whose published weights are downloaded
at the first start; with dinov2_s_frozen its head alone is trained. UniMatch V2's authors published
for a frozen DINOv2-S, with 92 labels of Pascal VOC, 82.0 % mIoU, for the tuned one 79.1; of our
rounds on DINOv2 neither score nor time was measured.

Expected score and time of the default network: they depend on the data. Learning rates, steps,
operations and the scales of labelling are those of configs/camvid.py, which were chosen on 12
labelled street scenes (docs/results.md). With a crop of 257x257, the largest that is chosen, two
cores take about 3 s for a step of the teacher and 8 s for a step of a student.
"""

from ml_collections import ConfigDict

from configs import _dinov2, default

NETWORKS = ("", "dinov2_s", "dinov2_s_frozen")


def get_config(network: str = "") -> ConfigDict:
    """Returns a config for one workstation: images of any size, a network of NETWORKS."""
    if network not in NETWORKS:
        raise ValueError(
            f"the argument of configs/folder.py is {network!r}: make it one of "
            f"{', '.join(NETWORKS[1:])}, or leave it out"
        )
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
    # Chosen from the sizes of the images, as are the dilation rates, which () leaves open.
    config.data.downscale = 0
    config.data.crop = ()
    config.data.scale = ()
    config.model.aspp_rates = ()
    config.model.backbone = "efficientnet_lite0"
    config.model.pretrained = "imagenet"
    # The head starts from scratch, unlike the backbone, hence its ten times higher rate.
    config.optim.teacher.learning_rate = 0.015
    config.optim.teacher.head_multiplier = 10.0
    config.optim.student.learning_rate = 0.015
    # All operations lower the score on CamVid, and change nothing on data of more varied scenes.
    config.sda.ops = default.MILD_OPERATIONS
    # Five scales take 4.5 times as long. On CamVid at half size enlarged images lowered the score.
    config.pseudo.scales = (0.75, 1.0)
    # For images of up to half a megapixel these need no more memory than a step of a student.
    config.pseudo.batch = 4
    config.eval.batch = 4
    config.train.teacher_steps = 1500
    config.train.steps = 500
    # Where fewer images are labelled, a batch has each of them several times, augmented anew.
    config.train.batch_labeled = 8
    config.train.batch_unlabeled = 8
    config.train.checkpoint_every = 250
    config.rounds.count = 3
    config.rounds.control = True
    # Never worse than without unlabelled images, as far as the held-out images can tell.
    config.rounds.keep = "best_on_holdout"
    if network:
        _dinov2.use(config, "s")
        config.model.freeze_backbone = network == "dinov2_s_frozen"
    return config
