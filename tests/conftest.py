"""Eight simulated devices for every test, shape checks at run time, and the smallest data."""

import os
import subprocess

# Compiling is what the tests spend their time on; tiny networks run fast enough as they come.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
# The TPU's compiler, which is installed for some tests, looks for chips otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401 - the hook finds it by name

# Shapes in signatures are checked at every call of the package's functions.
install_import_hook("semiseg_jax", "tests.typecheck.check")

import jax
import numpy as np
import pytest
from PIL import Image

from configs import default
from semiseg_jax import mesh


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory):
    """Tests that build the same program compile it once."""
    folder = os.environ.get("SEMISEG_TEST_CACHE") or tmp_path_factory.mktemp("compiled")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def tiny_config(**changes):
    """The smallest config that has every kind of layer; changes by dotted key, __ for the dot."""
    config = default.get_config()
    config.model.backbone = "tiny"
    config.model.head_features = 8
    config.model.low_level_features = 4
    config.model.aspp_rates = (1, 2)
    config.model.dropout = 0.0
    config.data.crop = (32, 40)
    config.train.steps = 4
    config.train.batch_labeled = 8
    config.train.batch_unlabeled = 8
    config.train.log_every = 2
    config.train.checkpoint_every = 2
    config.pseudo.scales = (1.0,)
    config.rounds.count = 1
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


@pytest.fixture
def folder_data(tmp_path):
    """A folder data set: 12 training and 5 evaluation images of 3 classes, two sizes."""
    root = tmp_path / "folder_data"
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


@pytest.fixture
def folder_config(folder_data, tmp_path):
    """A config for `folder_data`, 4 of 12 labelled, everything tiny."""
    return tiny_config(
        data__name="folder",
        data__root=str(folder_data),
        data__cache_dir=str(tmp_path / "cache"),
        data__classes=("ground", "thing", "corner"),
        data__labels=4.0,
    )


@pytest.fixture
def config_of_pairs(folder_config):
    """`folder_config`, two images at a time everywhere."""
    folder_config.train.batch_labeled = folder_config.train.batch_unlabeled = 2
    folder_config.pseudo.batch = folder_config.eval.batch = 2
    return folder_config


@pytest.fixture
def one_device(monkeypatch):
    """Runs take one device, for which programs compile fastest."""
    make = mesh.make_mesh
    monkeypatch.setattr(mesh, "make_mesh", lambda: make(jax.devices()[:1]))


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
