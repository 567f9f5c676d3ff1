"""The step compiled for a TPU slice held to bounds, and predicted against measured memory."""

import importlib.util
import os
import subprocess
import sys

import pytest

from configs import default
from semiseg_jax.planning import chips, programs

pytestmark = pytest.mark.slow
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU's compiler, is not installed (pip install libtpu==0.0.42.1)",
)


def small_config():
    config = default.get_config()
    config.model.backbone = "resnet18"
    config.model.compute_dtype = "bfloat16"
    config.data.crop = (129, 129)
    config.train.batch_labeled = config.train.batch_unlabeled = 8
    return config


@needs_libtpu
def test_student_step_for_v5e_within_its_bounds():
    """ResNet-18 at 129x129, 8 + 8 images on four chips, compiled without any."""
    made = programs.step(small_config(), "student", 19, chips.topology("v5e:2x2"))
    cost = made.cost
    assert isinstance(cost, programs.Cost)
    assert set(cost.collectives) == {"all-reduce"}
    assert not any("f32" in types for types in cost.convolved)
    # About an eighth above what was compiled when this was written (1.75 GB, 0.20 GB and 0.20 GB):
    # a change that needs more has a reason or is a mistake. With rows turned into batch (see
    # `mesh.compiler_options`) it was 5.76 GB, 2.13 GB and 0.39 GB.
    assert cost.traffic < 2.0e9
    assert cost.main_traffic < 0.24e9
    assert cost.memory.total < 0.23e9
    # The compiler also counts what is elementwise.
    assert cost.flops < cost.compiler_flops < 1.4 * cost.flops


MEASURE = """
import re, sys
import jax, numpy as np
from configs import default
from semiseg_jax import mesh, optim, state, steps
from semiseg_jax.data import streams
from semiseg_jax.models import deeplab
from semiseg_jax.planning import chips, programs

def kilobytes(what):
    return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

config = default.get_config()
config.model.backbone, size, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
config.data.crop = (size, size)
config.train.batch_labeled = config.train.batch_unlabeled = batch
predicted = programs.step(config, "student", 19, chips.topology("cpu")).cost.memory.total

where = mesh.make_mesh()
model = deeplab.build(config.model, 19)
tx, _ = optim.make_optimizer(config.optim, "student", 10)
taken = streams.of_stage(config, "student")
step = steps.make_train_step(model, tx, config.loss, taken, where)
key = jax.random.key(0)
made = state.create(state.init_variables(model, 0, where), tx, where)
batch = mesh.to_devices({
    "image": np.zeros((2 * batch, size, size, 3), np.uint8),
    "label": np.zeros((2 * batch, size, size), np.uint8),
    "is_pseudo": np.arange(2 * batch) >= batch,
}, where)
compiled = step.lower(made, batch, key).compile()
held = sum(leaf.nbytes for leaf in jax.tree.leaves((made, batch)))
jax.block_until_ready((made, batch))
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = kilobytes("VmRSS")
jax.block_until_ready(compiled(made, batch, key))
print(predicted, held + 1024 * (kilobytes("VmHWM") - before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("backbone", "size", "batch"), [("tiny", 129, 8), ("resnet18", 129, 4)])
def test_predicted_memory_is_within_a_quarter_of_the_measured_peak(backbone, size, batch):
    command = [sys.executable, "-c", MEASURE, backbone, str(size), str(batch)]
    # One device, compiled as runs are.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    predicted, measured = map(int, done.stdout.split())
    assert predicted == pytest.approx(measured, rel=0.25)
