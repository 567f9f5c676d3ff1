"""Every key there is, with its unit and constraint; the defaults are the paper's recipe.

Not run by itself: another config gets this one and changes what differs. On the command line,
`--config.key=value` changes one key; a key that is not declared here is refused.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """The defaults; the deviations from the paper and from its released code are explained in
    docs/method.md."""
    config = ConfigDict()
    # Seed of weights, order and augmentation; any integer. Split and built-in data have their own.
    config.seed = 0
    config.data = data()
    config.sda = sda()
    config.model = model()
    config.loss = loss()
    config.optim = optim()
    config.train = train()
    config.pseudo = pseudo()
    config.eval = evaluation()
    config.rounds = rounds()
    # Locked: a config that sets a key not declared here is refused.
    return config.lock()


def data() -> ConfigDict:
    """What is read, and how it is cut."""
    data = ConfigDict()
    # Source: streets (built in), camvid, cityscapes, pascal_voc, folder, or tfds:NAME for any data
    # set of TensorFlow Datasets with an image and a mask. docs/data.md says how each must lie.
    data.name = "folder"
    # Folder of the data; "" for $SEMISEG_DATA/NAME, else data/NAME; for tfds:NAME the folder of
    # TFDS, "" for its own default.
    data.root = ""
    # Where derived data and compiled programs are kept; "" for $SEMISEG_CACHE, else
    # ~/.cache/semiseg_jax.
    data.cache_dir = ""
    # Halve (2), third (3), … images once into the cache, antialiased; masks nearest. 1: as is.
    data.downscale = 1

    # Source `folder`: where images and masks lie, below the root or anywhere. A mask has its
    # image's name, with `mask_suffix` for the ending.
    data.image_dir = "images"
    data.mask_dir = "masks"
    # How the names of images end, such as "_photo.jpg"; "" for any image file, whatever its ending.
    data.image_suffix = ""
    data.mask_suffix = ".png"
    # Sources `folder` and `tfds:NAME`: class names in id order; at least 2. () for those that the
    # TFDS feature has.
    data.classes = ()
    # (R, G, B) 0..255 of each class; () for a generated palette.
    data.palette = ()
    # Mask values that mean "no label"; they become 255.
    data.ignore_ids = (255,)
    # ((mask value, class id), …) where the values are not the class ids; () for none.
    data.id_map = ()

    # Source `tfds:NAME`: features of the image, of its mask, and of a name for it ("": TFDS's own
    # id of an example); and the split to train on. eval.split is the one to evaluate on.
    data.tfds_image = "image"
    data.tfds_mask = "segmentation_mask"
    data.tfds_id = ""
    data.tfds_train = "train"

    # Source `cityscapes`: also take the 19,997 images of train_extra, as unlabelled ones.
    data.train_extra = False
    # Source `pascal_voc`: train on the 10,582 images of VOC and SBD; else on VOC's own 1,464.
    data.voc_augmented = True

    # A folder of further unlabelled images, below the root or anywhere, nested or not; "" for none.
    data.unlabeled_dir = ""
    # Split lists, one or two columns (image, mask or None) or bare ids; relative to the root,
    # else to the working folder. "" for labeled: drawn by `labels`; for unlabeled: every training
    # image that is not labelled; for evaluation: the source's own list of `eval.split`. Training
    # images that are listed for evaluation are not drawn, and not unlabelled.
    data.labeled_list = ""
    data.unlabeled_list = ""
    data.evaluation_list = ""
    # Unlabelled images to take for each labelled one, drawn by `split_seed`, more of them with a
    # larger ratio; 0 for all there are.
    data.unlabeled_ratio = 0.0
    # Labelled images to draw where `labeled_list` is "": a count (> 1) or a share (0..1] of the
    # training images; 0 for all of them.
    data.labels = 0.0
    # Seed of that draw; draws of one seed are nested, and have every class where they can.
    data.split_seed = 0
    # Where there is no evaluation set: images with masks to hold out for it, a count (> 1) or a
    # share (0..1); 0 for none, which is an error then. Where eval.select is "holdout": labelled
    # images to hold out for that.
    data.holdout = 0.0

    # Source `streets`: seed, images drawn for training and for evaluation, size in pixels.
    data.streets_seed = 0
    data.streets_train = 480
    data.streets_val = 120
    data.streets_size = (96, 160)

    # Which images meet the weak norm, and which the strong one: each a subset of {labeled,
    # pseudo}. Paper: labeled / pseudo; released code: both / both; plain self-training:
    # both / (). The teacher and the control take labelled images weakly augmented, whatever
    # stands here.
    data.weak_stream = ("labeled",)
    data.strong_stream = ("pseudo",)

    # Crop (height, width) in pixels.
    data.crop = (769, 769)
    # Random scale, drawn uniformly from [low, high].
    data.scale = (0.5, 2.0)
    # Mirror half of the images left to right.
    data.mirror = True
    # Batches that are made ahead, at least 1; and threads that make them, 0 for as many as cores.
    data.prefetch = 4
    data.threads = 0
    return data


def sda() -> ConfigDict:
    """Strong data augmentation (paper, section 3.2)."""
    sda = ConfigDict()
    # Operations drawn for each image, at least 0.
    sda.num_ops = 3
    # Draw with replacement, applied in the order drawn; else distinct ones in list order.
    sda.replace = True
    # uniform: drawn from the range; released: the constants of the authors' code.
    sda.magnitude = "uniform"
    # Before scale and crop, as the paper draws it; after is several times cheaper.
    sda.before_geometry = False
    # The pool.
    sda.ops = (
        "contrast_gamma",
        "contrast_linear",
        "brightness",
        "brightness_channel",
        "equalize",
        "hsv",
        "invert_channel",
        "blur",
        "noise_gau",
        "noise_pos",
        "channel_shuffle",
        "dropout",
        "coarse_dropout",
        "multiply",
        "salt_pepper",
        "solarize",
        "jpeg_compression",
    )
    return sda


def model() -> ConfigDict:
    """The network."""
    model = ConfigDict()
    # xception65; resnet18, resnet50, resnet101, with the deep stem of 32-32-64 or 64-64-128
    # channels resnet50c, resnet101c or resnet50s, resnet101s; efficientnet_lite0; resnet10_slim;
    # tiny.
    model.backbone = "resnet18"
    # v3plus (DeepLabV3+), v3plus_smp (as segmentation_models_pytorch builds it: no norm inside
    # separable convolutions, one of them before the decoder joins the low-level branch), v2
    # (DeepLabV2, the sum of dilated classifiers).
    model.head = "v3plus"
    # Weights to start from; "" for none: .npz, .safetensors or, where torch is installed, .pth; or
    # the prefix of a TensorFlow checkpoint. Layouts (whatever a file has is taken, but for a
    # classifier of another number of classes): torchvision's and timm's ResNets; timm's Xception-65
    # and that of TensorFlow's DeepLab, with its head; segmentation_models_pytorch's DeepLabV3+ on
    # a ResNet; the original names of EfficientNet-Lite0; a run's own model/weights.safetensors.
    # Fresh networks of this backbone take them: the teacher, and students that start from scratch.
    model.pretrained = ""
    # Input pixels a side of one pixel of the backbone's last features: 8, 16 or 32.
    model.output_stride = 16
    # Dilation of a stage's first block, where the stage's stride becomes dilation: previous (that
    # of the stage before; torchvision, timm, TensorFlow), stage (that of the others in the stage;
    # segmentation_models_pytorch), or auto: that of the weights, else previous.
    model.first_dilation = "auto"
    # Factors on the dilation of the last stage's blocks (ResNet-50 and -101: 3, ResNet-18: 2) or of
    # the last block's convolutions (Xception-65: 3), integers above 0; () for none.
    model.multi_grid = ()
    # dsbn; dsbn_shared_affine (Split-BN); shared; frozen (statistics stay as loaded).
    model.norm = "dsbn"
    # Share of the running moment kept in each step, [0, 1).
    model.norm_momentum = 0.9
    # Added to the variance, > 0; unset: that of the weights, else 1e-3 and 1e-5.
    model.norm_epsilon = ConfigDict()
    model.norm_epsilon.backbone = config_dict.placeholder(float)
    model.norm_epsilon.head = config_dict.placeholder(float)
    # Of v3plus: channels of ASPP and decoder; channels of the branch from stride 4.
    model.head_features = 256
    model.low_level_features = 48
    # Dilation rates of the head, in pixels of the features; () for those usual for head and output
    # stride: v3plus 6, 12, 18 at stride 16 and twice that at 8; v2 6, 12, 18, 24 at stride 8 and
    # half that at 16; v3plus_smp 12, 24, 36.
    model.aspp_rates = ()
    # Share of the output of v3plus's ASPP dropped in training, [0, 1); v2 has no dropout.
    model.dropout = 0.1
    # Resize with the corners of both grids aligned; unset: as the weights have it, else not.
    model.align_corners = config_dict.placeholder(bool)
    # Mean and deviation of the input: imagenet, half (-1..1), lite ((x - 127) / 128), or auto:
    # that of the weights in `pretrained`, else the one usual for the backbone.
    model.input_normalization = "auto"
    # float32 or bfloat16 compute; parameters, statistics, softmax and losses stay float32.
    model.compute_dtype = "float32"
    # Compute the inside of each block again in the backward pass instead of keeping it: less
    # memory, about a third more work.
    model.remat = False
    return model


def loss() -> ConfigDict:
    """Losses; labelled images have cross-entropy, in whatever stream they are."""
    loss = ConfigDict()
    # Of pseudo-labelled images: scl, scl_official, sce, ce.
    loss.unlabeled = "scl"
    # Its weight beside that of the labelled images, at least 0.
    loss.unlabeled_weight = 1.0
    loss.scl = ConfigDict()
    # Treat the weight w as a constant.
    loss.scl.stop_gradient = True
    # Floor of the one-hot label inside the logarithm of the reverse term, (0, 1).
    loss.scl.label_floor = 1e-4
    # w becomes 1 above .8; unset: for scl_official alone.
    loss.scl.saturate = config_dict.placeholder(bool)
    # Weights of the cross-entropy and of the reverse cross-entropy, also of sce.
    loss.scl.alpha = 1.0
    loss.scl.beta = 1.0
    return loss


def optim() -> ConfigDict:
    """SGD with momentum, learning rate * (1 - step / steps) ^ poly_power."""
    optim = ConfigDict()
    # Learning rates at step 0; the head's is `head_multiplier` times that of the backbone. The
    # control has the student's.
    optim.teacher = ConfigDict({"learning_rate": 0.01, "head_multiplier": 1.0})
    optim.student = ConfigDict({"learning_rate": 0.002, "head_multiplier": 10.0})
    # train.batch_labeled that the learning rates are for: with another one they are multiplied by
    # its share of this. 0: they are what they say, whatever the batch.
    optim.reference_batch = 0
    # Share of the last update kept, [0, 1).
    optim.momentum = 0.9
    # Of the schedule above, at least 0; at 0 the rate stays what it is.
    optim.poly_power = 0.9
    # On kernels; none on norms and biases.
    optim.weight_decay = 1e-4
    return optim


def train() -> ConfigDict:
    """Length and batch of a stage."""
    train = ConfigDict()
    # Optimiser steps of one student, at least 1; and of the teacher, the same unless changed.
    train.steps = 20_000
    train.teacher_steps = train.get_oneway_ref("steps")
    # Labelled and pseudo-labelled images of a stream that holds them, in the global batch;
    # multiples of the number of devices.
    train.batch_labeled = 16
    train.batch_unlabeled = 16
    # Micro-batches that a step goes through one after the other, for batches that the memory does
    # not hold; batches are multiples of this times the number of devices. Loss and gradients are
    # those of the whole batch, but each micro-batch is normalised by its own moments, and the
    # running ones move with each in turn.
    train.accumulate = 1
    # Steps between two lines of metrics, and between two checkpoints.
    train.log_every = 50
    train.checkpoint_every = 1000
    # Step at which five steps are profiled into the stage's folder; 0 for none.
    train.profile_at = 0
    return train


def pseudo() -> ConfigDict:
    """How the teacher labels."""
    pseudo = ConfigDict()
    # Sizes at which it sees an image, as multiples of the image's.
    pseudo.scales = (0.5, 0.75, 1.0, 1.5, 1.75)
    # See the mirrored image too.
    pseudo.flip = True
    # What is averaged over them: softmax or logits.
    pseudo.average = "softmax"
    # Pixels whose largest averaged probability is below become 255; 0 for none, below 1.
    pseudo.min_confidence = 0.0
    # As eval.window and eval.window_stride; what images are padded to is eval.pad_to here too.
    pseudo.window = ()
    pseudo.window_stride = ()
    # Images labelled at a time; where they do not divide over the devices, as many more as do.
    pseudo.batch = 8
    # Also keep each pixel's confidence, as grey PNGs: 255 times the largest probability.
    pseudo.keep_confidence = False
    return pseudo


def evaluation() -> ConfigDict:
    """The protocol of the reported mIoU."""
    evaluation = ConfigDict()
    # Which of the source's sets: val, test, …
    evaluation.split = "val"
    # As pseudo.scales and pseudo.flip; softmax values are averaged.
    evaluation.scales = (1.0,)
    evaluation.flip = False
    # Scaled images larger than (height, width) pixels are seen through windows of that size whose
    # logits are averaged, every `window_stride` (down, across) pixels; () and () for whole images.
    evaluation.window = ()
    evaluation.window_stride = ()
    # Where a set has more than 8 sizes of image, a side is padded to a multiple of this, in pixels,
    # so that few programs are compiled; 1 for never. Labelling pads so too.
    evaluation.pad_to = 128
    # Images evaluated at a time, as pseudo.batch.
    evaluation.batch = 8
    # Steps between evaluations inside a stage; 0 for its end alone.
    evaluation.every = 0
    # The weights of a stage that count, which label and are reported: its last ones; or the best of
    # those that `every` evaluates: "holdout" on data.holdout of the labelled images, which are then
    # not trained on; "reported" on the very set that is reported, which flatters. Rows say which.
    evaluation.select = "last"
    return evaluation


def rounds() -> ConfigDict:
    """Algorithm 1."""
    rounds = ConfigDict()
    # Students trained one after the other, at least 0.
    rounds.count = 3
    # Backbone of the students; "" for the teacher's.
    rounds.student_model = ""
    # Weights that such a student starts from, where it is another backbone than the teacher's; ""
    # for none.
    rounds.student_pretrained = ""
    # What a student starts from: teacher, its weights where the network is the same; or scratch.
    rounds.student_init = "teacher"
    # Also train the control: the teacher trained on with labels alone, for as many steps as all
    # students together. Without it a gain may be that of longer training.
    rounds.control = False
    return rounds
