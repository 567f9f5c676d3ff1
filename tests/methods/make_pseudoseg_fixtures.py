"""Writes fixtures/pseudoseg.json: results of the authors' functions on `reference_arrays`.

    python tests/methods/make_pseudoseg_fixtures.py FOLDER

FOLDER is a checkout of github.com/googleinterns/wss at the commit below, which is written for
TensorFlow 1. It runs under TensorFlow 2 with a stand-in for slim's 1x1 convolution and its batch
norm, in float32.
"""

import json
import math
import pathlib
import sys
import textwrap
import types

import numpy as np
import reference_arrays as arrays
import tensorflow.compat.v1 as tf

COMMIT = "b01acaf0317a48ed8b4a1a239a9a90bcfb0844e8"
KERNELS = {
    "key": arrays.KEY_KERNEL,
    "query": arrays.QUERY_KERNEL,
    "pixel_normalization": arrays.CONV_KERNEL,
}


def constant(array):
    return tf.constant(array, tf.float32)


def conv2d(x, channels, size, scope, normalizer_fn=None, normalizer_params=None, **_):
    """slim.conv2d for 1x1 kernels without bias, with the kernels of `reference_arrays`."""
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


def import_authors_code(folder):
    slim = types.ModuleType("slim")
    slim.conv2d, slim.batch_norm, slim.arg_scope = conv2d, batch_norm, NoScope
    contrib = types.ModuleType("tensorflow.contrib")
    contrib.slim = slim
    sys.modules["tensorflow"] = tf
    sys.modules["tensorflow.contrib"] = contrib
    sys.path.insert(0, folder)
    from core import train_utils_core

    return train_utils_core


def block(folder, first, last):
    """The lines of train_wss.py from one that contains `first` to one that contains `last`."""
    lines = (pathlib.Path(folder) / "train_wss.py").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if first in line)
    end = next(i for i in range(start, len(lines)) if last in lines[i])
    return textwrap.dedent("\n".join(lines[start : end + 1]))


def fuse(folder):
    """The pseudo-labels, and the loss of the strong view over the pixels that are not padding."""
    flags = types.SimpleNamespace(logit_norm=True, soft_pseudo_label=True, temperature=0.5)
    values = {
        "FLAGS": flags,
        "tf": tf,
        "batch_size": 2,
        "logits_weak": constant(arrays.DECODER_LOGITS),
        "att_logits_weak": constant(arrays.ATTENTION_LOGITS),
    }
    exec(block(folder, "if FLAGS.logit_norm:", "+ att_prob_weak) / 2."), values)
    exec(block(folder, "if FLAGS.soft_pseudo_label and", "prob_weak /= "), values)
    cross_entropy = tf.nn.softmax_cross_entropy_with_logits_v2(
        labels=values["prob_weak"], logits=constant(arrays.STRONG_LOGITS)
    )
    valid = constant(arrays.PADDED)
    loss = tf.reduce_sum(cross_entropy * valid) / tf.reduce_sum(valid)
    return values["prob_weak"], loss


def main(folder):
    core = import_authors_code(folder)
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
    labels, loss = fuse(folder)
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
        results = {name: np.asarray(value).tolist() for name, value in session.run(graph).items()}
    origin = {
        "repository": "github.com/googleinterns/wss",
        "commit": COMMIT,
        "files": ["core/train_utils_core.py", "train_wss.py"],
    }
    path = pathlib.Path(__file__).parent / "fixtures" / "pseudoseg.json"
    path.write_text(json.dumps({"origin": origin, **results}) + "\n")


if __name__ == "__main__":
    tf.disable_eager_execution()
    main(sys.argv[1])
