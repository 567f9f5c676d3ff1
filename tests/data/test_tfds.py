"""The export of TFDS data sets: tiny ones on disk, without downloads."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from semiseg_jax.data import image_io, load
from semiseg_jax.runtime.logger import capture_lines
from tests.conftest import tiny_config
from tests.data import miniatures
from tests.errors import raises_code

COUNTS = {"train": 4, "val": 2}


def mask_of(number):
    """Returns a trimap of the values 1, 2, 3, as in oxford_iiit_pet."""
    return (np.indices((20, 24)).sum(0) // 4 + number).astype(np.uint8) % 3 + 1


def image_of(number):
    return miniatures.image(number, 20, 24)


def jpeg(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


class PetsInMiniature(tfds.core.GeneratorBasedBuilder):
    """A data set with the features of oxford_iiit_pet, and features that TFDS stores decoded."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "segmentation_mask": tfds.features.Image(shape=(None, None, 1), use_colormap=True),
            "names": tfds.features.LabeledImage(
                labels=["dog", "cat", "edge", "none"], shape=(None, None, 1)
            ),
            "array": tfds.features.Tensor(shape=(20, 24), dtype=np.uint8),
            "wide": tfds.features.Tensor(shape=(20, 24), dtype=np.int32),
            "label": tfds.features.ClassLabel(num_classes=2),
            "file_name": tfds.features.Text(),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 5), "test": self._generate_examples(5, 7)}

    def _generate_examples(self, first, last):
        for number in range(first, last):
            palette = miniatures.png(mask_of(number), miniatures.voc_palette(256))
            yield (
                number,
                {
                    "image": io.BytesIO(jpeg(image_of(number))),
                    "segmentation_mask": io.BytesIO(palette),
                    "names": mask_of(number)[..., None],
                    "array": mask_of(number),
                    "wide": mask_of(number).astype(np.int32) * 1000,
                    "label": 0,
                    "file_name": f"Pet_{number}.jpg",
                },
            )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("tensorflow_datasets")
    PetsInMiniature(data_dir=root).download_and_prepare()
    return root


@pytest.fixture
def config(prepared, tmp_path):
    return tiny_config(
        data__name="tfds:pets_in_miniature",
        data__root=str(prepared),
        data__cache_dir=str(tmp_path / "cache"),
        data__classes=("pet", "background", "edge"),
        data__id_map=((1, 0), (2, 1), (3, 2)),
        data__tfds_id="file_name",
        data__labels=2.0,
        eval__split="test",
    )


def test_any_data_set_is_exported_as_it_is_once(config, tmp_path):
    with capture_lines() as lines:
        data = load.load_dataset(config)
    assert [len(p) for p in (data.labeled, data.unlabeled, data.evaluation)] == [2, 3, 2]
    assert {e.id for e in data.evaluation} == {"Pet_5", "Pet_6"}
    for example in (*data.labeled, *data.evaluation):
        number = int(example.id.removeprefix("Pet_"))
        with open(example.image, "rb") as file:
            assert file.read() == jpeg(image_of(number))
        mask = image_io.read_mask(example.mask, data.table)
        np.testing.assert_array_equal(mask, mask_of(number) - 1)
    assert sum("once" in line for line in lines) == 2
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("tfds-*/**/*.*")}
    assert load.load_dataset(config).split_hash == data.split_hash
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_incomplete_export_is_repeated(config, tmp_path):
    load.load_dataset(config)
    (completion_file,) = (tmp_path / "cache").rglob("train.json")
    completion_file.unlink()
    mask = next((tmp_path / "cache").rglob("Pet_3.png"))
    mask.unlink()
    load.load_dataset(config)
    assert completion_file.exists() and mask.exists()


@pytest.mark.parametrize("feature", ["array", "names"])
def test_decoded_mask_features_and_class_names_of_tfds(config, feature):
    config.data.tfds_mask = feature
    if feature == "names":
        config.data.classes, config.data.id_map = (), ()
    config.data.tfds_id = ""
    data = load.load_dataset(config)
    masks = [image_io.read_mask(e.mask, data.table) for e in data.evaluation]
    for number in (5, 6):
        expected = mask_of(number) - (feature == "array")
        assert any(np.array_equal(expected, mask) for mask in masks)
    if feature == "names":
        assert data.classes == ("dog", "cat", "edge", "none")


@pytest.mark.parametrize(
    ("changes", "code", "part"),
    [
        (
            {"data__tfds_mask": "mask"},
            "tfds-feature-missing",
            "one of array, fi",
        ),
        ({"data__tfds_mask": "wide"}, "tfds-feature-not-an-image", "1000 to 3000"),
        (
            {"data__tfds_mask": "file_name"},
            "tfds-image-format-unknown",
            "file_name",
        ),
        (
            {"eval__split": "val"},
            "tfds-split-missing",
            "val",
        ),
        (
            {"data__name": "tfds:mnist:9.9.9"},
            "tfds-dataset-unknown",
            "only: ",
        ),
        ({"data__classes": ()}, "class-count-invalid", "0"),
        ({"data__id_map": ()}, "mask-values-unknown", "values 3,"),
    ],
)
def test_unsuitable_config_raises(config, changes, code, part):
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    with raises_code(code, part):
        load.load_dataset(config)


def test_missing_evaluation_split_is_allowed_with_holdout(config):
    config.eval.split = "val"
    config.data.holdout = 0.4
    data = load.load_dataset(config)
    assert [len(p) for p in (data.labeled, data.unlabeled, data.evaluation)] == [2, 1, 2]


def test_cityscapes_from_tfds_equals_cityscapes_from_folders(tmp_path):
    counts = COUNTS | {"test": 1, "train_extra": 2}
    archives = tmp_path / "tensorflow_datasets" / "downloads" / "manual"
    miniatures.write_cityscapes_archives(archives, counts)
    folders = miniatures.write_cityscapes(tmp_path / "cityscapes", counts)
    loaded = {}
    for name, root in (
        ("tfds:cityscapes/semantic_segmentation", archives.parents[1]),
        ("cityscapes", folders),
    ):
        config = tiny_config(data__name=name, data__root=str(root), data__labels=2.0)
        config.data.cache_dir = str(tmp_path / "cache")
        config.data.train_extra = True
        loaded[name] = load.load_dataset(config)
    exported, from_folders = loaded.values()
    assert exported.split_hash == from_folders.split_hash
    assert exported.name == from_folders.name
    assert len(exported.unlabeled) == 4
    for a, b in zip(
        (*exported.labeled, *exported.evaluation),
        (*from_folders.labeled, *from_folders.evaluation),
        strict=True,
    ):
        masks = (image_io.read_mask(e.mask, d.table) for e, d in ((a, exported), (b, from_folders)))
        np.testing.assert_array_equal(*masks)
        np.testing.assert_array_equal(image_io.read_image(a.image), image_io.read_image(b.image))
