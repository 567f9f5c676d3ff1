"""The images that may be suggested."""

import shutil

from etils import epath

from semiseg_jax import workdir
from semiseg_jax.suggestions import candidates


def test_evaluation_and_labelled_images_are_never_named(folder_config, folder_data, tmp_path):
    images = folder_data / "images"
    shutil.copy(images / "val" / "000.png", images / "train" / "copy_of_evaluated.png")
    workdir.write_config(tmp_path, folder_config)
    read = candidates.read(epath.Path(tmp_path))
    named = {e.id for e in read.unlabeled}
    assert len(named) == 8
    assert not named & {e.id for e in read.dataset.labeled}
    assert "evaluation image" in read.aside["copy_of_evaluated"]
