"""Files that Pillow, OpenCV and tifffile write in all formats and modes are read to the pixel."""

import pytest

from tests.data import image_corpus

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("program", ["pillow", "opencv", "tifffile"])
def test_every_file_that_a_program_writes_is_read_to_the_pixel(program, tmp_path):
    if program == "tifffile":
        pytest.importorskip("tifffile")
    files = getattr(image_corpus, f"by_{program}")()
    image_corpus.check(files, tmp_path / "file")
