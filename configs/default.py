"""All config keys, each with its unit and constraint; the defaults are the paper's recipe.

This config is not run on its own: the other configs start from it and set the keys that differ. On
the command line `--config.key=value` sets one key; a key that is not declared here is an error.
"""

from ml_collections import ConfigDict, config_dict

# Operations of strong augmentation that keep small images recognisable: no noise, dropout, colour
# swaps or solarize. For sda.ops of configs with small crops.
MILD_OPERATIONS = (
    *("contrast_gamma", "contrast_linear", "brightness", "brightness_channel", "hsv"),
    *("equalize", "blur", "multiply", "jpeg_compression"),
)


def get_config() -> ConfigDict:
    """Returns the default config.

    docs/method.md lists the choices where the paper is silent or differs from its released code.
    """
    config = ConfigDict()
    # Seed of initial weights, example order and augmentation; any integer. The split of the data
    # and the built-in scenes have seeds of their own.
    config.seed = 0
    config.data = data()
    config.sda = sda()
    config.method = method()
    config.model = model()
    config.loss = loss()
    config.optim = optim()
    config.train = train()
    config.pseudo = pseudo()
    config.eval = evaluation()
    config.rounds = rounds()
    # Locked: setting an undeclared key raises an error.
    return config.lock()


def data() -> ConfigDict:
    """Data source, splits, streams and crops."""
    data = ConfigDict()
    # Source: streets (built in), camvid, cityscapes, pascal_voc, folder, or tfds:NAME for any
    # TensorFlow Datasets data set with an image and a mask. docs/data.md describes the layout of
    # each.
    data.name = "folder"
    # Folder of the data; "" for $SEMISEG_DATA/NAME, else data/NAME. For tfds:NAME the TFDS data
    # folder; "" for the TFDS default.
    data.root = ""
    # Folder for derived data and compiled programs; "" for $SEMISEG_CACHE, else
    # ~/.cache/semiseg_jax.
    data.cache_dir = ""
    # Factor, at least 1: 2 halves the image sides, 3 makes them a third, and so on; 1 leaves the
    # images unchanged; 0 chooses it so that half of the images have at most half a megapixel.
    # Smaller copies are written once to the cache, images antialiased, masks by nearest neighbour.
    data.downscale = 1
    # Largest number of pixels of an image or mask, at least 1. Files whose header states more are
    # refused before they are decoded, because a small file may expand to any size. Decoding takes
    # about 10 bytes of memory per pixel.
    data.max_image_pixels = 2**28

    # Source `folder`: folders of images and masks, relative to the root or absolute. A mask has the
    # name of its image, with `mask_suffix` in place of the image's ending.
    data.image_dir = "images"
    data.mask_dir = "masks"
    # Ending of the image names, such as "_photo.jpg"; "" for any image file extension. Ending of
    # the mask names, not empty.
    data.image_suffix = ""
    data.mask_suffix = ".png"
    # Sources `folder` and `tfds:NAME`: class names in id order, distinct, at least 2. () for the
    # names that the TFDS feature declares.
    data.classes = ()
    # (R, G, B) of each class, 0 to 255; () for the colours of `mask_colors`, else a generated
    # palette.
    data.palette = ()
    # Mask values, 0 to 255, that mean "no label"; they are mapped to 255.
    data.ignore_ids = (255,)
    # ((mask value, class id), …) if the mask values are not the class ids; () for none.
    data.id_map = ()
    # What the pixels of mask files are, if not values. Coloured masks: the colour (R, G, B) of each
    # class, in their order; or ((colour, class id), …), with 255 for no label. A colour that is not
    # listed is an error. Of masks with a palette, the colours of the palette count.
    data.mask_colors = ()
    # Largest difference to a colour of `mask_colors` in each channel, 0 to 127.
    data.mask_tolerance = 0
    # Masks with three channels that hold values: grey (equal channels), red, green or blue; "" for
    # none, which refuses such masks.
    data.mask_channel = ""
    # Masks of two classes with soft edges: grey levels from this one on, 1 to 255, are class 1,
    # others class 0. 0 for no threshold.
    data.mask_threshold = 0

    # Source `tfds:NAME`: feature names of the image, its mask and its name ("" for the TFDS example
    # id), and the split to train on. The split to evaluate on is eval.split.
    data.tfds_image = "image"
    data.tfds_mask = "segmentation_mask"
    data.tfds_id = ""
    data.tfds_train = "train"

    # Source `cityscapes`: add the 19,997 images of train_extra to the unlabelled images.
    data.train_extra = False
    # Source `pascal_voc`: train on the 10,582 images of VOC and SBD; if False, on VOC's own 1,464.
    data.voc_augmented = True

    # Folder of further unlabelled images, nested or flat, relative to the root or absolute; ""
    # for none.
    data.unlabeled_dir = ""
    # Split lists of one or two columns (image, mask or None) or of bare ids; a path relative to
    # the root, else to the working folder, else a shipped list below configs/splits. With ""
    # labelled images are drawn (`labels`), unlabelled images are all training images that are not
    # labelled, and evaluation images are the source's list `eval.split`. Training images in
    # `evaluation_list` are neither drawn as labelled nor used as unlabelled.
    data.labeled_list = ""
    data.unlabeled_list = ""
    data.evaluation_list = ""
    # An image that both the labelled and the unlabelled list name, as some published lists do.
    # refuse: an error; labeled: it is labelled alone; both: it is used with and without its mask.
    data.in_both_lists = "refuse"
    # Unlabelled images per labelled image, at least 0, drawn with `split_seed`; the draw of a
    # larger ratio contains that of a smaller one. 0 for all unlabelled images.
    data.unlabeled_ratio = 0.0
    # Labelled images to draw if `labeled_list` is "": a count (> 1) or a fraction (0..1] of the
    # training images; 0 for all.
    data.labels = 0.0
    # Seed of that draw, at least 0. Draws with one seed are nested, and small ones cover as many
    # classes as they can.
    data.split_seed = 0
    # Images with masks to hold out if there is no evaluation set: a count (> 1) or a fraction
    # (0..1); with 0 a missing evaluation set is an error. With eval.select = "holdout": labelled
    # images to hold out for the selection of weights.
    data.holdout = 0.0

    # Source `streets`: seed, at least 0; numbers of training and evaluation images, at least 1;
    # (height, width) in pixels.
    data.streets_seed = 0
    data.streets_train = 480
    data.streets_val = 120
    data.streets_size = (96, 160)

    # Kinds of image that the weak and the strong norm normalise: subsets of {labeled, pseudo}, not
    # both empty. Paper: labeled / pseudo; released code: both / both; plain self-training:
    # both / (). Teacher and control always take weakly augmented labelled images alone.
    data.weak_stream = ("labeled",)
    data.strong_stream = ("pseudo",)

    # Crop (height, width) in pixels; () chooses it from the sizes of the labelled and unlabelled
    # images, with at most 257x257 pixels (semiseg_jax/data/size_settings.py has the rules).
    data.crop = (769, 769)
    # Range [low, high], 0 < low <= high, of the random scale, which is drawn uniformly; () chooses
    # it so that most images are no smaller than the crop.
    data.scale = (0.5, 2.0)
    # True: crops of labelled images contain a pixel of a class that is drawn first, among those in
    # the image, with the weights of loss.class_weights = "balanced", so that rare classes occur
    # more often. False: crops are anywhere.
    data.balance_crops = False
    # Mirror half of the images left to right.
    data.mirror = True
    # For model.freeze_backbone. Weakly augmented images are shown whole, as large as the crop holds
    # them, and mirrored at most, so that the backbone's features of them are computed once and
    # then read from `cache_dir`. docs/networks.md has what that costs and saves.
    data.cache_features = False
    # Batches to prefetch, at least 1; threads that prepare them, 0 for one per core.
    data.prefetch = 4
    data.threads = 0
    return data


def sda() -> ConfigDict:
    """Strong data augmentation (paper, section 2.1 and figure 2)."""
    sda = ConfigDict()
    # Operations per image, at least 0.
    sda.num_ops = 3
    # True: draw with replacement and apply in drawing order. False: draw distinct operations and
    # apply them in the order of `ops`.
    sda.replace = True
    # uniform: magnitudes drawn from each operation's range; released: the constants of the authors'
    # code.
    sda.magnitude = "uniform"
    # True: augment before scale and crop, as the paper draws it. False: after them, which is
    # several times cheaper.
    sda.before_geometry = False
    # Pool of operations: distinct names.
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


def method() -> ConfigDict:
    """The semi-supervised method, and the views of unlabelled images that some methods take."""
    method = ConfigDict()
    # self_training: the paper's, labels before each student. The others label inside the training
    # step of the students: fixmatch, cutmix (CutMix-Seg), classmix, unimatch, unimatch_v2, cct,
    # pseudoseg, advsemiseg, s4gan. docs/methods.md has what they are and the published recipes.
    method.name = "self_training"
    # Methods that label unlabelled images inside the training step see views of them: one scale,
    # crop and mirror per image (data.scale, data.crop, data.mirror), and for each strong view
    # colours of its own. docs/data.md has the published values; the defaults are UniMatch's.
    method.views = ConfigDict()
    # Colours of a strong view. jitter: colour jitter, then greyscale, then blur, each with its
    # probability; sda: the operations of `sda`. The keys below but `per_batch` are for jitter.
    method.views.kind = "jitter"
    # Strengths (brightness, contrast, saturation, hue). The factors of the first three, at least 0,
    # are drawn from 1 - strength (at least 0) to 1 + strength, the shift of hue, in circles, from
    # -strength to strength; its strength is in 0..0.5. The four are applied in random order.
    method.views.jitter = (0.5, 0.5, 0.5, 0.25)
    # Probabilities, 0..1, that a view is jittered, made grey, and blurred.
    method.views.jitter_probability = 0.8
    method.views.grey_probability = 0.2
    method.views.blur_probability = 0.5
    # Range [low, high], 0 < low <= high, of the standard deviation of the Gaussian blur in pixels.
    method.views.blur_sigma = (0.1, 2.0)
    # True: one draw of colours for all images of a step, as ClassMix has it; False: one per image.
    method.views.per_batch = False
    # What images are mixed with: other_image, or same_image, another crop of the same image, as in
    # the published code of UniMatch.
    method.views.partner = "other_image"

    # One section for each method; only that of `name` is read. Thresholds are least confidences,
    # at least 0; above 1 no pixel has a loss.
    method.fixmatch = ConfigDict()
    # Pixels below it have no loss.
    method.fixmatch.threshold = 0.95

    method.cutmix = averaged_teacher(decay=0.99, warmup=False)
    # The unlabelled loss is multiplied by the share of pixels with at least this confidence.
    method.cutmix.threshold = 0.97
    # Weight of the unlabelled loss, the squared difference summed over the classes, at least 0.
    method.cutmix.weight = 1.0
    # Pixels that share and mean are taken over: valid; all counts padding too, as published.
    method.cutmix.divide_by = "valid"

    method.classmix = averaged_teacher(decay=0.99, warmup=True)
    # As for cutmix.
    method.classmix.threshold = 0.968
    method.classmix.weight = 1.0
    method.classmix.divide_by = "valid"
    # eval; train, as published: the teacher normalises by the moments of the batch, with dropout,
    # so that its labels depend on the other images of the batch.
    method.classmix.teacher_mode = "eval"

    method.unimatch = ConfigDict()
    # As for fixmatch.
    method.unimatch.threshold = 0.95
    # Share of feature channels that the dropped view loses, [0, 1).
    method.unimatch.dropout = 0.5

    method.unimatch_v2 = averaged_teacher(decay=0.996, warmup=True)
    # As for fixmatch.
    method.unimatch_v2.threshold = 0.95

    method.cct = ConfigDict()
    # Weight of the unlabelled loss, a mean over the classes, at least 0; reached after this share
    # of the stage, 0..1.
    method.cct.weight = 30.0
    method.cct.ramp = 0.1
    # Class that is no object; -1: the one with the most labelled pixels of the batch, for data
    # without a background class.
    method.cct.background = 0
    # Auxiliary decoders by what perturbs their features, 0 to 64 each: virtual adversarial
    # training, dropout of channels, guided cutout, context and object masks, feature drop, noise.
    method.cct.vat = 2
    method.cct.dropout = 6
    method.cct.cutout = 6
    method.cct.context_mask = 2
    method.cct.object_mask = 2
    method.cct.feature_drop = 6
    method.cct.noise = 6

    method.pseudoseg = ConfigDict()
    # Weight of the loss of strong views, at least 0.
    method.pseudoseg.weight = 1.0
    # Temperature that sharpens the fused labels, (0, 1]; 1 does not.
    method.pseudoseg.temperature = 0.5
    # Class 0 is a background, which gets no class map. False for data without one.
    method.pseudoseg.has_background = True
    # Side of the square that is cut out of each strong view, in pixels, even; 0 for none.
    method.pseudoseg.cutout = 100
    # Rate of the dropout before the image classifier, [0, 1); published: .5 for Xception, else 0.
    method.pseudoseg.classifier_dropout = 0.0

    method.advsemiseg = discriminator()
    # Least probability of "real" of a pixel with a self-training loss, at least 0; above 1 none.
    method.advsemiseg.threshold = 0.2
    # Share of the stage after which self-training begins, 0..1; 1: never.
    method.advsemiseg.start = 0.25
    # Weight of the self-training loss, at least 0.
    method.advsemiseg.weight = 0.1
    # Weights of the adversarial losses of labelled and of unlabelled images, at least 0. The paper
    # and the published README have the first; the default of the published code is 0.1.
    method.advsemiseg.adversarial_labeled = 0.01
    method.advsemiseg.adversarial_unlabeled = 0.001

    method.s4gan = discriminator()
    # Images whose probability of "real" is above it have a self-training loss, at least 0; 1 or
    # more: none. Published: 0.6 for Pascal VOC, 0.7 for Cityscapes.
    method.s4gan.threshold = 0.6
    # As for advsemiseg; the first step has no self-training in any case.
    method.s4gan.start = 0.0
    method.s4gan.weight = 1.0
    # Weight of the distance between the mean features of labels and of predictions, at least 0.
    method.s4gan.matching = 0.1
    return method


def discriminator() -> ConfigDict:
    """The optimiser of a discriminator, Adam: the keys of methods that have one."""
    optimizer = ConfigDict()
    # Learning rate at step 0, at least 0; optim.reference_batch does not change it.
    optimizer.discriminator_rate = 1e-4
    # Weights of the former means of gradients and of their squares, each [0, 1).
    optimizer.discriminator_betas = (0.9, 0.99)
    # The rate is multiplied by (1 - step / steps) to this power, at least 0.
    optimizer.discriminator_power = 0.9
    return optimizer


def averaged_teacher(decay: float, warmup: bool) -> ConfigDict:
    """The exponential moving average (EMA) of the network that labels for it."""
    average = ConfigDict()
    # Weight of the old value in an update, [0, 1).
    average.decay = decay
    # Let the decay grow as 1 - 1 / (step + 1) to its value.
    average.warmup = warmup
    # Norm statistics of the teacher: average (as the parameters), copy (the student's), keep (those
    # of its start).
    average.statistics = "average"
    # Weights that are evaluated and kept: average or student.
    average.report = "average"
    return average


def model() -> ConfigDict:
    """Network architecture and initial weights."""
    model = ConfigDict()
    # Convolutional: xception65; resnet18, resnet50, resnet101; with a deep stem of 32-32-64
    # channels resnet50c, resnet101c, of 64-64-128 channels resnet50s, resnet101s;
    # efficientnet_lite0, efficientnet_lite1, efficientnet_lite2; convnext_tiny, convnext_small,
    # convnext_base (no batch norm, so that model.norm acts on the head); resnet10_slim; tiny,
    # tiny_convnext.
    # Vision transformers: dinov2_vits14, dinov2_vitb14, dinov2_vitl14; dinov3_vits16,
    # dinov3_vitb16, dinov3_vitl16; tiny_dinov2, tiny_dinov3. They have no output stride and no
    # batch norm: the keys of both have no effect.
    model.backbone = "resnet18"
    # On convolutional backbones: v3plus (DeepLabV3+); v3plus_smp (DeepLabV3+ as in
    # segmentation_models_pytorch: no norm inside separable convolutions, one of which precedes the
    # join of decoder and low-level branch); v2 (DeepLabV2, the sum of dilated classifiers). On
    # vision transformers: dpt (four levels merged from coarse to fine, as in UniMatch V2); linear
    # (a classifier of the last features).
    model.head = "v3plus"
    # Initial weights; "" for none. "imagenet" for the published ImageNet weights of the backbone,
    # "dinov2" for those of DINOv2, from an installed package or downloaded (docs/networks.md).
    # Otherwise a .npz, .safetensors, .pth or .pt file, or the prefix of a TensorFlow checkpoint.
    # Supported layouts: the ResNets of torchvision and timm; Xception-65 of timm and, with its
    # head, of TensorFlow's DeepLab; the DeepLabV3+ on ResNet of segmentation_models_pytorch;
    # EfficientNet-Lite with its original names; DINOv2 and DINOv3 in their own layout, timm's and
    # that of transformers; checkpoints of UniMatch V2; a run's model/weights.safetensors. Of
    # several state dicts in a .pth file one is chosen by its key, as in best.pth/model_ema. All
    # tensors of the file are loaded except a classifier for another number of classes. New networks
    # of this backbone start from them: the teacher, and students with rounds.student_init =
    # "scratch".
    model.pretrained = ""
    # Ratio of input size to the backbone's last feature size, per side: 8, 16 or 32.
    model.output_stride = 16
    # Dilation of the first block of a stage whose stride is replaced by dilation: previous (the
    # dilation of the stage before, as in torchvision, timm and TensorFlow), stage (that of the
    # stage's other blocks, as in segmentation_models_pytorch), or auto (that of the weights, else
    # previous).
    model.first_dilation = "auto"
    # Factors on the dilation of the last stage's blocks (ResNet-50 and -101: 3, ResNet-18: 2) or of
    # the last block's convolutions (Xception-65: 3); integers above 0, () for none.
    model.multi_grid = ()
    # dsbn; dsbn_shared_affine (Split-BN); shared; frozen (statistics stay as loaded).
    model.norm = "dsbn"
    # Weight of the old running moment in each update, [0, 1).
    model.norm_momentum = 0.9
    # Added to the variance, > 0; unset: that of the weights, else 1e-3 (backbone; vision
    # transformers as published), 1e-5 (head).
    model.norm_epsilon = ConfigDict()
    model.norm_epsilon.backbone = config_dict.placeholder(float)
    model.norm_epsilon.head = config_dict.placeholder(float)
    # Heads v3plus and v3plus_smp: channels of ASPP and decoder; channels of the branch from stride
    # 4; at least 1.
    model.head_features = 256
    model.low_level_features = 48
    # Dilation rates of the head, in feature pixels, integers above 0; () for the usual rates of
    # head and output stride: v3plus 6, 12, 18 at stride 16, twice these at 8; v2 6, 12, 18, 24 at
    # stride 8, half these at 16; v3plus_smp 12, 24, 36 at every stride. Where data.crop, data.scale
    # or data.downscale is chosen from the images, () shrinks these rates to the crop.
    model.aspp_rates = ()
    # Dropout rate after the ASPP in training, [0, 1); v2 has no dropout.
    model.dropout = 0.1
    # Whether resizing aligns the corner pixels of both grids; unset: as the weights require, else
    # True for dpt and False for other heads.
    model.align_corners = config_dict.placeholder(bool)
    # How the learned positions of a vision transformer are interpolated to grids of other sizes:
    # original (as in DINOv2's code and UniMatch V2) or timm (with antialiasing).
    model.position_rule = "original"
    # Vision transformers pad their tokens to a multiple of this number, and mask what they added:
    # the results are the same. 1 for no padding.
    model.token_multiple = 1
    # Input mean and standard deviation: imagenet, half (maps to -1..1), lite ((x - 127) / 128),
    # dinov3_satellite (of DINOv3's weights for satellite images), or auto (that of the weights in
    # `pretrained`, else the usual one of the backbone).
    model.input_normalization = "auto"
    # Train the head alone: the backbone keeps its weights and the statistics of its norms, and has
    # neither gradients nor a state in the optimiser.
    model.freeze_backbone = False
    # Dtype of the computation, float32 or bfloat16; parameters, statistics, softmax and losses stay
    # float32.
    model.compute_dtype = "float32"
    # Rematerialisation: recompute the activations inside each block in the backward pass instead of
    # storing them; less memory, about a third more arithmetic.
    model.remat = False
    return model


def loss() -> ConfigDict:
    """Losses; an image has the loss of its kind, labelled or pseudo-labelled, in either stream."""
    loss = ConfigDict()
    # Loss of labelled images: ce (cross-entropy); ohem (cross-entropy of the hard pixels, online
    # hard example mining); focal (focal loss); ce_dice (cross-entropy plus the Dice loss of the
    # batch). ohem and ce_dice are defined over the batch of a step: train.accumulate must be 1.
    loss.labeled = "ce"
    # A pixel is hard if the probability of its label is at most the larger of `probability` and the
    # probability below which `share` of the labelled pixels of the batch lie. Both 0 to 1, not both
    # 0: share is the smallest part of the pixels that has a loss, a probability of 1 keeps all.
    loss.ohem = ConfigDict({"probability": 0.7, "share": 1 / 6})
    # Exponent of the focal loss (1 - p)^gamma * CE, p the probability of the label; at least 0, 0
    # for cross-entropy.
    loss.focal_gamma = 2.0
    # Weights of the classes in the loss of labelled images, whatever its kind. "" for none;
    # balanced: sqrt(median of n / n_c), n_c the labelled pixels of the class in all labelled masks;
    # or a number for each class, at least 0. The loss is the weighted mean. The Dice loss of
    # ce_dice has none.
    loss.class_weights = config_dict.FieldReference("", field_type=object)
    # balanced, for a class without a labelled pixel: refuse (an error) or zero (its weight).
    loss.absent_classes = "refuse"
    # Loss of pseudo-labelled images: scl, scl_official, sce or ce.
    loss.unlabeled = "scl"
    # Its weight relative to the loss of labelled images, at least 0.
    loss.unlabeled_weight = 1.0
    loss.scl = ConfigDict()
    # Treat the weight w as a constant in the gradient.
    loss.scl.stop_gradient = True
    # Floor of the one-hot label inside the logarithm of the reverse term, (0, 1).
    loss.scl.label_floor = 1e-4
    # Set w to 1 above .8; unset: for scl_official alone.
    loss.scl.saturate = config_dict.placeholder(bool)
    # Weights of the cross-entropy and of the reverse cross-entropy in scl, scl_official and sce.
    loss.scl.alpha = 1.0
    loss.scl.beta = 1.0
    return loss


def optim() -> ConfigDict:
    """Optimiser; learning rate * (1 - step / steps) ^ poly_power."""
    optim = ConfigDict()
    # sgd (with momentum); adam (weight decay is added to the gradient); adamw (weight decay is
    # subtracted from the parameter, times the learning rate). All as PyTorch has them.
    optim.kind = "sgd"
    # Learning rate of the backbone at step 0, > 0; the head's is `head_multiplier` (> 0) times as
    # large. The control has the student's.
    optim.teacher = ConfigDict({"learning_rate": 0.01, "head_multiplier": 1.0})
    optim.student = ConfigDict({"learning_rate": 0.002, "head_multiplier": 10.0})
    # The train.batch_labeled for which the learning rates are given, in images; learning rates are
    # multiplied by train.batch_labeled / reference_batch. 0: learning rates do not depend on the
    # batch.
    optim.reference_batch = 0
    # sgd: momentum coefficient (weight of the previous update), [0, 1).
    optim.momentum = 0.9
    # adam and adamw: weights of the former mean of gradients and of squared gradients, each [0, 1);
    # added to the root of the latter, at least 1e-30.
    optim.betas = (0.9, 0.999)
    optim.epsilon = 1e-8
    # Exponent of the schedule above, at least 0; 0 for a constant rate.
    optim.poly_power = 0.9
    # Weight decay, at least 0: of kernels alone, norms and biases have none; with `decay_all` of
    # every parameter.
    optim.weight_decay = 1e-4
    optim.decay_all = False
    # Learning rates by layer, of vision transformers alone: each block's is this factor, above 0
    # and at most 1, times that of the block behind it; the embeddings count as a block before the
    # first. 1 for none.
    optim.layer_decay = 1.0
    return optim


def train() -> ConfigDict:
    """Length and batch size of a stage."""
    train = ConfigDict()
    # Optimiser steps of one student, at least 1; those of the teacher equal them unless set.
    train.steps = 20_000
    train.teacher_steps = train.get_oneway_ref("steps")
    # Labelled and pseudo-labelled images per step, in each stream that holds the kind, over all
    # devices; multiples of the number of devices.
    train.batch_labeled = 16
    train.batch_unlabeled = 16
    # Micro-batches per step, processed one after the other, for batches that exceed the memory;
    # batch sizes are multiples of this times the number of devices. Loss and gradients are those of
    # the whole batch, but each micro-batch is normalised by its own moments and updates the running
    # moments in turn.
    train.accumulate = 1
    # Steps between two lines of metrics, and between two checkpoints; at least 1.
    train.log_every = 50
    train.checkpoint_every = 1000
    # Step at which a profile of five steps starts, written to the stage's folder; 0 for none.
    train.profile_at = 0
    return train


def pseudo() -> ConfigDict:
    """How the teacher labels."""
    pseudo = ConfigDict()
    # Scales of the teacher's input, relative to the image size; at least one, each > 0.
    pseudo.scales = (0.5, 0.75, 1.0, 1.5, 1.75)
    # Also predict on the mirrored image.
    pseudo.flip = True
    # The quantity averaged over scales and mirror images: softmax or logits.
    pseudo.average = "softmax"
    # Pixels whose largest averaged probability is below this become 255; [0, 1), 0 for none.
    pseudo.min_confidence = 0.0
    # As eval.window and eval.window_stride. Labelling pads images by eval.pad_to.
    pseudo.window = ()
    pseudo.window_stride = ()
    # Images per labelling batch, at least 1; rounded up to a multiple of the number of devices.
    pseudo.batch = 8
    # Also write each pixel's confidence as grey PNGs: 255 times the largest probability.
    pseudo.keep_confidence = False
    return pseudo


def evaluation() -> ConfigDict:
    """Protocol of the reported mIoU."""
    evaluation = ConfigDict()
    # Evaluation set of the source: val, test, …
    evaluation.split = "val"
    # As pseudo.scales and pseudo.flip; softmax values are averaged.
    evaluation.scales = (1.0,)
    evaluation.flip = False
    # Scaled images larger than (height, width) pixels are predicted in windows of that size, every
    # `window_stride` (down, across) pixels, whose logits are averaged; () and () for whole images.
    evaluation.window = ()
    evaluation.window_stride = ()
    # If a set has more than 8 image sizes, each side is padded to a multiple of this, in pixels, so
    # that few programs are compiled; at least 1, 1 for no padding. Also applies to labelling.
    evaluation.pad_to = 128
    # Images per evaluation batch, as pseudo.batch.
    evaluation.batch = 8
    # Steps between evaluations inside a stage, at least 0; 0 for its end alone.
    evaluation.every = 0
    # Weights of a stage that label and are reported. last: its last weights. Otherwise the best of
    # the evaluations at `every`: holdout evaluates them on data.holdout of the labelled images,
    # which are then not trained on; reported on the reported set itself, which biases the score
    # upwards. Result rows record the choice.
    evaluation.select = "last"
    # Folder with true masks of unlabelled images, named as these; "" for none. Each stage is then
    # evaluated on these images too, which shows how good its labels are. No mask there is trained
    # on or selects weights: for experiments.
    evaluation.unlabeled_masks = ""
    return evaluation


def rounds() -> ConfigDict:
    """Algorithm 1."""
    rounds = ConfigDict()
    # Students trained one after the other, at least 0.
    rounds.count = 3
    # Backbone of the students; "" for the teacher's.
    rounds.student_model = ""
    # Initial weights of the students if their backbone differs from the teacher's; "" for none.
    # Takes the same values as model.pretrained.
    rounds.student_pretrained = ""
    # Initial weights of a student. teacher: the teacher's, if the network is the same; scratch: as
    # a new network.
    rounds.student_init = "teacher"
    # Also train the control: the teacher, trained further on labels alone for as many steps as all
    # students together. It separates the gain of the method from that of longer training.
    rounds.control = False
    # Workdir of another run whose finished teacher to take instead of training one; "" for none.
    # Its config may differ only in keys that no teacher depends on (pseudo, sda, …) and model.norm.
    rounds.teacher_from = ""
    # Stage whose weights are written to model/. last: the last student. best_on_holdout: the stage
    # (teacher, student or control) with the highest mIoU on the labelled images that data.holdout
    # holds out; the last student if none are held out. An evaluation set that you name never
    # chooses.
    rounds.keep = "last"
    return rounds
