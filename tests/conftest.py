"""Eight simulated devices for every test, shape checks at each call, and the smallest data."""

import errno
import os
import pathlib
import subprocess
import time

from tests import FAST_COMPILATION

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {FAST_COMPILATION}"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
# The TPU's compiler, which is installed for some tests, looks for chips otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401 - the hook finds it by name

# Shapes in signatures are checked at every call of the package's functions. That is a third of the
# time of tracing a training step: `make test-slow` traces hundreds, of functions that `make test`
# has checked, and leaves it out.
if os.environ.get("SEMISEG_TEST_SHAPES", "1") == "1":
    install_import_hook("semiseg_jax", "tests.typecheck.check")

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from configs import default
from semiseg_jax import mesh


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory):
    """Compiles each program once, whichever worker of pytest-xdist meets it first.

    JAX does not write cache entries atomically. An entry that another worker is still writing fails
    to decompress; JAX then warns and compiles the program itself.
    """
    folder = os.environ.get("SEMISEG_TEST_CACHE")
    if not folder:
        # Each worker has its own folder inside the folder of the whole test run.
        own = tmp_path_factory.getbasetemp()
        folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "compiled"
    # A run compiles about a hundred small programs besides the few large ones.
    for name, value in (
        ("jax_compilation_cache_dir", str(folder)),
        ("jax_persistent_cache_min_compile_time_secs", 0.0),
    ):
        jax.config.update(name, value)
        # For the processes that tests start.
        os.environ[name.upper()] = str(value)


def pytest_runtest_setup(item):
    """Leaves out slow tests that would begin after SEMISEG_TEST_DEADLINE, in Unix time.

    .ci/run sets it: on a machine at less than half the usual speed it would be cut off, and say
    nothing about any test. What was left out is listed at the end, with this reason.
    """
    deadline = os.environ.get("SEMISEG_TEST_DEADLINE")
    if deadline and item.get_closest_marker("slow") and time.time() > float(deadline):
        pytest.skip("the time for slow tests is over on this machine")


# TensorFlow traces the graph of the input pipeline in every stage of a run, for seconds with all
# operations; test_sda.py and test_main_slow.py have them all. One of each kind: of all pixels
# alike, of each pixel with a draw of its own, and of a region.
FEW_OPERATIONS = ("multiply", "noise_gau", "coarse_dropout")


def tiny_config(**changes):
    """The smallest config that has every kind of layer; changes by dotted key, __ for the dot."""
    config = default.get_config()
    config.model.backbone = "tiny"
    config.model.head_features = 8
    config.model.low_level_features = 4
    config.model.aspp_rates = (1, 2)
    config.model.dropout = 0.0
    config.data.crop = (32, 40)
    config.sda.ops = FEW_OPERATIONS
    config.train.steps = 4
    config.train.batch_labeled = 8
    config.train.batch_unlabeled = 8
    config.train.log_every = 2
    config.train.checkpoint_every = 2
    config.pseudo.scales = (1.0,)
    config.rounds.count = 1
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def write_folder_data(root):
    """Writes a folder data set: 12 training and 5 evaluation images of 3 classes, two sizes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 5)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            height, width = (36, 48) if i % 3 else (48, 36)
            mask = np.zeros((height, width), np.uint8)
            mask[rng.integers(4, 20) :, rng.integers(4, 20) :] = 1
            mask[:6, :10] = 2
            mask[-2:, :] = 255
            image = np.stack([60 * mask, 200 - 50 * mask, 20 + 30 * mask], -1).astype(np.int64)
            image = (image % 256 + rng.integers(0, 20, image.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / "images" / split / f"{i:03d}.png")
            palette = Image.fromarray(mask)
            palette.putpalette([i for c in range(256) for i in (c, 255 - c, c // 2)])
            palette.save(root / "masks" / split / f"{i:03d}.png")
    return root


def tiny_folder_config(root, cache_dir):
    """A config for the data of `write_folder_data`: 4 of 12 images labelled, everything tiny.

    Half of a run's time is that of tracing its programs, and half of the layers of `tiny_config`
    are those of its head. Runs have the smaller head, where a test does not set the default.
    """
    return tiny_config(
        model__head="v2",
        data__name="folder",
        data__root=str(root),
        data__cache_dir=str(cache_dir),
        data__classes=("ground", "thing", "corner"),
        data__labels=4.0,
    )


def in_pairs(config):
    """The config with two images in every batch."""
    config.train.batch_labeled = config.train.batch_unlabeled = 2
    config.pseudo.batch = config.eval.batch = 2
    return config


@pytest.fixture
def folder_data(tmp_path):
    """The root of a folder data set that the test may change."""
    return write_folder_data(tmp_path / "folder_data")


@pytest.fixture
def folder_config(folder_data, tmp_path):
    """A config for `folder_data`, 4 of 12 labelled, everything tiny."""
    return tiny_folder_config(folder_data, tmp_path / "cache")


@pytest.fixture
def config_of_pairs(folder_config):
    """`folder_config` with two images in every batch."""
    return in_pairs(folder_config)


@pytest.fixture
def without_report(monkeypatch):
    """Runs draw no report, which takes over a quarter of the time of the smallest network's run."""
    from semiseg_jax.reporting import page

    monkeypatch.setattr(page, "write", lambda workdir: [])


@pytest.fixture
def one_device(monkeypatch):
    """Runs take one device, for which programs compile fastest."""
    make = mesh.make_mesh
    monkeypatch.setattr(mesh, "make_mesh", lambda devices=None: make(jax.devices()[:1]))


@pytest.fixture
def closed(monkeypatch):
    """Closes a file or folder to reading, for whoever runs the tests."""
    refused = set()

    def guard(owner, name):
        plain = getattr(owner, name)

        def call(path, *args, **kwargs):
            if os.fspath(path) in refused:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
            return plain(path, *args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    guard(os, "listdir")
    for name in ("iterdir", "read_bytes", "read_text"):
        guard(type(epath.Path("/")), name)
        guard(pathlib.Path, name)
    return lambda path: refused.add(os.fspath(path))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, 8 MB: a whole run with its report fits."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
