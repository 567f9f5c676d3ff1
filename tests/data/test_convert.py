"""The command itself: what it prints, and how it ends."""

import os
import re
import subprocess
import sys

import pytest
from absl import flags

from tests import processes
from tests.data.annotations import folders


def run(folder, *arguments):
    """Runs the command in a process of its own; returns its status and its two outputs."""
    command = [sys.executable, "-m", "semiseg_jax.data.convert", *arguments]
    environment = os.environ | {"PYTHONPATH": str(processes.ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def annotated(tmp_path):
    """Two annotated images, one of them with a line, a missing one, and one without annotations."""
    folder = tmp_path / "my in"
    for name, shape in (
        ("a", folders.shape()),
        ("b", folders.shape("bus[1]", [[0, 0], [9, 9]], "line")),
        ("gone", folders.shape()),
    ):
        if name != "gone":
            folders.write_image(folder / f"{name}.png", level=ord(name))
        content = folders.labelme(folders.shape(), shape, image=f"{name}.png")
        folders.write_json(folder / f"{name}.json", content)
    folders.write_image(folder / "c.png", level=9)
    return folder


def test_there_and_back(tmp_path, annotated):
    status, output, errors = run(tmp_path, "--input=my in", "--output=my data")
    assert (status, errors) == (0, "")
    for expected in (
        r"Format: labelme",
        r"labeled +2\b",
        r"unlabeled +1\b",
        r"car +3 \(30\.00 %\)",
        r"bus\[1\] +0 \(0\.00 %\)",
        r"line or point: not drawn \(--line_width\) +1, first in b\.png",
        r"^0 pixels are in objects of several classes",
        r"^1 annotated images are missing: gone\.png$",
        r"python -m semiseg_jax\.data\.preview --config='my data/my_data\.py' --output=",
    ):
        assert re.search(expected, output, re.M), (expected, output)
    status, output, errors = run(
        tmp_path, "--input=my data", "--output=back", "--to=coco", "--min_area=2"
    )
    assert (status, errors) == (0, "")
    assert re.search(r"car +2\b", output) and "No objects: pixels of background." in output
    assert (tmp_path / "back/annotations/instances_default.json").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--output=out"], "--input is missing"),
        (["--input=in"], "--output is missing"),
        (["--input=in", "--output=out"], "in is missing"),
        (["--input=in", "--output=out", "--from=coco", "--to=coco"], "convert to masks first"),
        (
            ["--input=in", "--output=out", "--empty=background", "--background=ignore"],
            "leave one of them out",
        ),
        (["--input=in", "--output=out", "--from=voc"], "coco|labelme|yolo|cvat|colors"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, arguments, sentence):
    status, output, errors = run(tmp_path, *arguments)
    assert status == 1 and output == "" and errors.startswith("Error: ")
    assert len(errors.splitlines()) == 1 and sentence in errors
    assert not list(tmp_path.iterdir())


def test_nobody_reads_what_it_prints(tmp_path, annotated):
    command = [sys.executable, "-m", "semiseg_jax.data.convert", "--input=my in", "--output=out"]
    environment = os.environ | {"PYTHONPATH": str(processes.ROOT)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait()
    assert (tmp_path / "out/conversion.json").exists()


def test_tensorflow_is_not_imported(tmp_path, annotated):
    code = (
        "import sys\nsys.modules['tensorflow'] = None\nsys.argv[0] = 'convert'\n"
        "import runpy\nrunpy.run_module('semiseg_jax.data.convert', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, f"--input={annotated}", "--output=out"]
    environment = os.environ | {"PYTHONPATH": str(processes.ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "convert" not in flags.FLAGS
