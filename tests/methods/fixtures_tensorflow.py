"""The fixtures of code in TensorFlow; see `make_fixtures.py`.

The published code is for TensorFlow 1. It runs under TensorFlow 2 with a stand-in for slim's 1x1
convolution and its batch norm, in float32.
"""

import importlib
import math
import sys
import types

import arrays
import numpy as np
import six
import tensorflow.compat.v1 as tf

KERNELS = {
    "key": arrays.KEY_KERNEL,
    "query": arrays.QUERY_KERNEL,
    "pixel_normalization": arrays.CONV_KERNEL,
}

# The defaults of the published code.
FLAGS = types.SimpleNamespace(
    att_strides=["15", "16"],
    att_v2=True,
    atrous_rates=None,
    attention_dim=128,
    drop_path_keep_prob=1.0,
    fine_tune_batch_norm=True,
    hard_example_mining_step=0,
    image_pyramid=None,
    logit_norm=True,
    model_variant="xception_65",
    output_stride=16,
    pseudo_label_threshold=0.0,
    pseudo_src="avg",
    soft_pseudo_label=True,
    temperature=0.5,
    top_k_percent_pixels=1.0,
    train_crop_size=["513", "513"],
    training_number_of_steps=30000,
    unlabeled_weight=1.0,
    upsample_logits=True,
    use_attention=True,
    weakly=False,
    weight_decay=0.00004,
)


def constant(array):
    return tf.constant(array, tf.float32)


def conv2d(x, channels, size, scope, normalizer_fn=None, normalizer_params=None, **_):
    """slim.conv2d for 1x1 kernels without bias, with the kernels of `arrays`."""
    assert size == [1, 1] and KERNELS[scope].shape[1] == channels
    y = tf.einsum("bhwi,io->bhwo", x, constant(KERNELS[scope]))
    return y if normalizer_fn is None else normalizer_fn(y, **normalizer_params)


def batch_norm(x, is_training):
    """slim.batch_norm with its defaults: epsilon .001, no scale, initial moments 0 and 1."""
    if not is_training:
        return x / math.sqrt(1 + 0.001)
    mean, variance = tf.nn.moments(x, axes=[0, 1, 2])
    return (x - mean) / tf.sqrt(variance + 0.001)


class NoScope:
    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


def import_published_code(repository):
    slim = types.ModuleType("slim")
    slim.conv2d, slim.batch_norm, slim.arg_scope = conv2d, batch_norm, NoScope
    contrib = types.ModuleType("tensorflow.contrib")
    contrib.slim, contrib.framework = slim, types.SimpleNamespace(smart_cond=None)
    sys.modules["tensorflow"] = tf
    sys.modules["tensorflow.contrib"] = contrib
    sys.modules["tensorflow.contrib.slim"] = slim
    sys.path.insert(0, str(repository.path))
    repository.source("core/train_utils_core.py")
    return importlib.import_module("core.train_utils_core")


def fuse(repository):
    """The pseudo-labels, and the loss of the strong view over the pixels that are not padding."""
    values = {
        "FLAGS": FLAGS,
        "tf": tf,
        "batch_size": 2,
        "logits_weak": constant(arrays.DECODER_LOGITS),
        "att_logits_weak": constant(arrays.ATTENTION_LOGITS),
    }
    file = "train_wss.py"
    repository.run(file, "if FLAGS.logit_norm:", "+ att_prob_weak) / 2.", values)
    repository.run(file, "if FLAGS.soft_pseudo_label and", "prob_weak /= ", values)
    cross_entropy = tf.nn.softmax_cross_entropy_with_logits_v2(
        labels=values["prob_weak"], logits=constant(arrays.STRONG_LOGITS)
    )
    valid = constant(arrays.PADDED)
    loss = tf.reduce_sum(cross_entropy * valid) / tf.reduce_sum(valid)
    return values["prob_weak"], loss


def whole_loss(repository, core):
    """The terms of the whole loss, on passes of the network that return given arrays.

    Without padding, whose class scores enter the moments of the published norm, and not of ours.
    """
    class_labels = np.stack([(c == arrays.LABELS_OF_FOUR).any((1, 2)) for c in (1, 2, 3)], 1)
    images = {name: tf.zeros((2, 4, 3, 3)) for name in ("labeled", "weak", "strong")}
    labels = tf.constant(arrays.LABELS_OF_FOUR[..., None], tf.int32)
    unlabeled = {
        "image": images["weak"],
        "strong": images["strong"],
        "label": labels,
        "valid": tf.ones((2, 4, 3, 1)),
    }
    labeled = {
        "image": images["labeled"],
        "label": labels,
        "cls_label": constant(class_labels),
        "valid": tf.ones((2, 4, 3, 1)),
    }
    logits = {
        "labeled": arrays.LABELED_DECODER_LOGITS,
        "weak": arrays.DECODER_LOGITS,
        "strong": arrays.STRONG_LOGITS,
    }
    layers = {
        "labeled": (arrays.LABELED_LAST, arrays.LABELED_MIDDLE),
        "weak": (arrays.LAST, arrays.MIDDLE),
    }
    modes = []

    def which(image):
        """The pass of an image: the published code renames it by an identity."""
        source = image
        while source.op.type == "Identity":
            source = source.op.inputs[0]
        return next(name for name, given in images.items() if given is source)

    def extract_features(image, is_training, **_):
        modes.append((which(image), is_training))
        last, middle = (constant(layer) for layer in layers[which(image)])
        return None, {
            "xception_65/exit_flow/block2": last,
            "xception_65/exit_flow/block1": middle,
            "xception_65/logits": tf.reduce_mean(last, (1, 2)) @ constant(arrays.CLASSIFIER_KERNEL),
        }

    def multi_scale_logits(image, output_end_points=False, **_):
        result = {"semantic": {"merged": constant(logits[which(image)])}}
        return (result, None) if output_end_points else result

    def options(**_):
        names = ("output_stride", "multi_grid", "model_variant", "depth_multiplier")
        more = ("divisible_by", "preprocessed_images_dtype")
        return types.SimpleNamespace(**dict.fromkeys(names + more), label_weights=1.0)

    preprocess = importlib.import_module("core.preprocess_utils")
    utils = importlib.import_module("third_party.deeplab.core.utils")
    losses = types.SimpleNamespace(_div_maybe_zero=core._div_maybe_zero)
    scope = {"tf": tf, "six": six, "preprocess_utils": preprocess, "utils": utils}
    scope["_div_maybe_zero"] = core._div_maybe_zero
    name = "add_softmax_cross_entropy_loss_for_each_scale"
    setattr(
        losses, name, repository.function("third_party/deeplab/utils/train_utils.py", name, scope)
    )
    scope = {
        "tf": tf,
        "six": six,
        "FLAGS": FLAGS,
        "common": types.SimpleNamespace(
            IMAGE="image", LABEL="label", OUTPUT_TYPE="semantic", ModelOptions=options
        ),
        "model": types.SimpleNamespace(
            multi_scale_logits=multi_scale_logits, MERGED_LOGITS_SCOPE="merged"
        ),
        "feature_extractor": types.SimpleNamespace(extract_features=extract_features),
        "train_utils": losses,
        "train_utils_core": core,
        "preprocess_utils": preprocess,
    }
    build = repository.function("train_wss.py", "_build_pseudo_seg", scope)
    iterators = (types.SimpleNamespace(get_next=lambda s=s: s) for s in (labeled, unlabeled))
    build(*iterators, {"semantic": 4}, arrays.IGNORE, batch_size=2)
    assert modes == [("weak", False), ("labeled", True)]
    names = ("loss_strong", "loss_labeled", "loss_attention", "loss_classes")
    return dict(zip(names, tf.losses.get_losses(), strict=True))


def pseudoseg(repository):
    tf.disable_eager_execution()
    core = import_published_code(repository)
    last = constant(arrays.LAST)
    end_points = {
        "xception_65/exit_flow/block2": last,
        "xception_65/exit_flow/block1": constant(arrays.MIDDLE),
    }
    present = constant(arrays.PRESENT)
    logits = tf.reduce_mean(last, axis=[1, 2]) @ constant(arrays.CLASSIFIER_KERNEL)
    whole = tf.ones((2, 4, 3, 1))
    padded = constant(arrays.PADDED[..., None])
    maps, refined = core.compute_cam_v2(end_points, logits, present, 4, valid_mask=whole)
    _, of_padded = core.compute_cam_v2(
        end_points, logits, present, 4, is_training=False, valid_mask=padded
    )
    labels, loss = fuse(repository)
    classification = tf.reduce_mean(
        tf.nn.sigmoid_cross_entropy_with_logits(labels=present, logits=logits)
    )
    graph = {
        "maps": maps,
        "refined": refined,
        "refined_with_padding": of_padded,
        "labels": labels,
        "loss": loss,
        "classification": classification,
        "whole": whole_loss(repository, core),
    }
    with tf.Session() as session:
        numbers = session.run(graph)
    terms = numbers.pop("whole")
    numbers = {name: np.asarray(value).tolist() for name, value in numbers.items()}
    return numbers | {"whole": {name: float(value) for name, value in terms.items()}}
