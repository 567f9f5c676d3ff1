"""Data sets of TFDS, made small on disk and never downloaded."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from semiseg_jax.data import labels, sources
from semiseg_jax.errors import UserError
from tests.conftest import tiny_config
from tests.data import miniatures

COUNTS = {"train": 4, "val": 2}


def mask_of(number):
    """Trimap values 1, 2, 3, as those of the pets; palette indices, not what they look like."""
    return (np.indices((20, 24)).sum(0) // 4 + number).astype(np.uint8) % 3 + 1


def image_of(number):
    return miniatures.image(number, 20, 24)


def jpeg(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


class PetsInMiniature(tfds.core.GeneratorBasedBuilder):
    """Features as of oxford_iiit_pet, two further ones that hold no files, and a label."""

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
    lines = []
    data = sources.load(config, lines.append)
    assert [len(p) for p in (data.labeled, data.unlabeled, data.evaluation)] == [2, 3, 2]
    assert {e.id for e in data.evaluation} == {"Pet_5", "Pet_6"}
    for example in (*data.labeled, *data.evaluation):
        number = int(example.id.removeprefix("Pet_"))
        with open(example.image, "rb") as file:
            assert file.read() == jpeg(image_of(number))
        mask = labels.read_mask(example.mask, data.table)
        np.testing.assert_array_equal(mask, mask_of(number) - 1)
    assert sum("once" in line for line in lines) == 2
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.*")}
    assert sources.load(config, lines.append).split_hash == data.split_hash
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_an_export_that_was_broken_off_is_made_again(config, tmp_path):
    sources.load(config)
    (done,) = (tmp_path / "cache").rglob("train.json")
    done.unlink()
    lost = next((tmp_path / "cache").rglob("Pet_3.png"))
    lost.unlink()
    sources.load(config)
    assert done.exists() and lost.exists()


@pytest.mark.parametrize("feature", ["array", "names"])
def test_masks_that_tfds_does_not_keep_as_files_and_names_of_its_own(config, feature):
    config.data.tfds_mask = feature
    if feature == "names":
        config.data.classes, config.data.id_map = (), ()
    config.data.tfds_id = ""
    data = sources.load(config)
    found = [labels.read_mask(e.mask, data.table) for e in data.evaluation]
    expected = [mask_of(number) - (feature == "array") for number in (5, 6)]
    for mask in expected:
        assert any(np.array_equal(mask, other) for other in found)
    if feature == "names":
        assert data.classes == ("dog", "cat", "edge", "none")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"data__tfds_mask": "mask"},
            "has no feature mask: set data.tfds_mask to one of array, fi",
        ),
        ({"data__tfds_mask": "wide"}, "The feature wide has shape .* 1000 to 3000: name an image"),
        (
            {"data__tfds_mask": "file_name"},
            "feature file_name holds files of kind unknown: name images",
        ),
        (
            {"eval__split": "val"},
            "has no split val: set data.tfds_train and eval.split to one of",
        ),
        (
            {"data__name": "tfds:mnist:9.9.9"},
            r"mnist:9.9.9 is not known to TFDS \(Dataset mnist cannot .*, only: \d.\d.\d\): give",
        ),
        ({"data__classes": ()}, "data.classes has 0 names"),
        ({"data__id_map": ()}, r"Pet_\d.png holds the values 3, which are neither a class nor ign"),
    ],
)
def test_what_does_not_fit_is_one_sentence(config, changes, sentence):
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    with pytest.raises(UserError, match=sentence):
        sources.load(config)


def test_a_split_that_is_not_there_matters_only_where_it_is_needed(config):
    config.eval.split = "val"
    config.data.holdout = 0.4
    data = sources.load(config)
    assert [len(p) for p in (data.labeled, data.unlabeled, data.evaluation)] == [2, 1, 2]


def test_cityscapes_from_its_archives_is_that_of_the_folders(tmp_path):
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
        loaded[name] = sources.load(config)
    one, other = loaded.values()
    assert one.split_hash == other.split_hash and one.name == other.name
    assert len(one.unlabeled) == 4
    for a, b in zip(
        (*one.labeled, *one.evaluation), (*other.labeled, *other.evaluation), strict=True
    ):
        masks = (labels.read_mask(e.mask, d.table) for e, d in ((a, one), (b, other)))
        np.testing.assert_array_equal(*masks)
        np.testing.assert_array_equal(labels.read_image(a.image), labels.read_image(b.image))
