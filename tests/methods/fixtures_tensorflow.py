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
import tensorflow.compat.v1 as tf

KERNELS = {
    "key": arrays.KEY_KERNEL,
    "query": arrays.QUERY_KERNEL,
    "pixel_normalization": arrays.CONV_KERNEL,
}


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
    contrib.slim = slim
    sys.modules["tensorflow"] = tf
    sys.modules["tensorflow.contrib"] = contrib
    sys.path.insert(0, str(repository.path))
    repository.source("core/train_utils_core.py")
    return importlib.import_module("core.train_utils_core")


def fuse(repository):
    """The pseudo-labels, and the loss of the strong view over the pixels that are not padding."""
    flags = types.SimpleNamespace(logit_norm=True, soft_pseudo_label=True, temperature=0.5)
    values = {
        "FLAGS": flags,
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
    }
    with tf.Session() as session:
        return {name: np.asarray(value).tolist() for name, value in session.run(graph).items()}
