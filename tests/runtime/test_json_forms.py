"""Readers of JSON files return a value of their form, or nothing."""

import functools
import json
import os
import signal

import pytest
from etils import epath

from semiseg_jax import pseudo_label_stats, pseudo_labels, results, workdir
from semiseg_jax.models import weight_files
from semiseg_jax.reporting import artifacts
from semiseg_jax.runtime import fileio, hashes, json_forms, metric_writer
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.serving import model_bundle, output_folder
from tests import json_mutants
from tests.rows import PROTOCOL

RUN = dict.fromkeys(("started", "split_hash", "devices", "machine"), "") | {
    "classes": ["a", "b"],
    "palette": [[0, 0, 0], [255, 0, 0]],
    "images": {"labelled": 3},
    "processes": 1,
    "versions": {"jax": "0.1"},
}
NORM = {"weak": [0.5, 1.0], "strong": [0.25, 2]}
FILES = {
    artifacts.RUN: (artifacts.read_run, RUN),
    artifacts.EVALUATION: (
        artifacts.read_evaluation,
        {
            "protocol": PROTOCOL,
            "gallery": "a",
            "kept": ["x/1"],
            "confusion": [[3, 0], [1, 2]],
            "miou_by_image": {"x/1": 0.5, "2": None},
        },
    ),
    artifacts.NORMS: (
        artifacts.read_norms,
        {"stem": dict.fromkeys(("mean", "var", "scale", "bias"), NORM)},
    ),
    f"{artifacts.PSEUDO_GALLERY}.json": (
        artifacts.read_pseudo,
        {"least_confident": {"a": 0.5}, "most_changed": {}},
    ),
    pseudo_label_stats.STATS_FILE: (
        pseudo_label_stats.read_stats,
        {
            "mean_confidence": 0.5,
            "ignored": 0.0,
            "class_share": {"a": 0.5, "b": 0.5},
            "labeled_share": {"a": 0.25, "b": 0.75},
            "warnings": ["b is rare"],
        },
    ),
    pseudo_labels.MANIFEST: (
        pseudo_labels.read_manifest,
        {
            "images": {
                "a": {"sha256": "0", "size": [2, 3], "mean_confidence": 0.5, "histogram": {"1": 6}}
            }
        },
    ),
    metric_writer.METRICS_FILE: (metric_writer.read_metrics, {"step": 2, "loss": 0.5}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_reader_takes_its_form_and_finds_every_other(tmp_path, name):
    read, content = FILES[name]
    path, folder = tmp_path / name, epath.Path(tmp_path)
    path.write_text(json.dumps(content))
    assert read(folder) in (content, [content])
    count = 0
    for text in json_mutants.mutants(content):
        path.write_text(text)
        found = read(folder)
        count += bool(found)
        # What passes is of types that later code expects, whatever was put in.
        assert found is None or not _holds(found, float("inf")), text
    # Unknown keys and other values of the right type pass.
    assert 0 < count < 300


NO_REPORT = {
    "results.json": lambda folder: results.read(folder / "results.json"),
    "row_hashes.json": lambda folder: results.read_row_hashes(folder / "results.json"),
    **{
        name: functools.partial(workdir.read_fingerprint, name=name)
        for name in ("config.json", "data.json", "fitted.json", "pretrained.json")
    },
    "model/model.json": model_bundle.load,
    output_folder.RECORD: output_folder.read_record,
    "w.safetensors": lambda folder: weight_files.read(folder / "w.safetensors"),
    "w.npz": lambda folder: weight_files.read_header(folder / "w.npz"),
    "w.pth": lambda folder: hashes.hash_files(folder / "w.pth"),
}


@pytest.mark.parametrize("name", [*FILES, *NO_REPORT])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_no_reader_waits_for_a_pipe(tmp_path, name, kind):
    """In place of a file there may be anything: it counts as missing, or is refused."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    make = {"pipe": os.mkfifo, "folder": os.mkdir, "loop": lambda p: os.symlink(p, p)}[kind]
    make(path)
    read = NO_REPORT[name] if name in NO_REPORT else FILES[name][0]
    signal.alarm(20)
    try:
        found = read(epath.Path(tmp_path))
    except UserError as error:
        assert "\n" not in str(error) and name != output_folder.RECORD
    else:
        assert not found or found == {"rows": [], "curve": []}
    finally:
        signal.alarm(0)


def _holds(value, number):
    """Whether a value contains a number that is not finite, or text that cannot be encoded."""
    if isinstance(value, dict):
        return any(_holds(v, number) for v in [*value, *value.values()])
    if isinstance(value, list):
        return any(_holds(v, number) for v in value)
    if isinstance(value, float):
        return value != value or abs(value) == number
    return isinstance(value, str) and "\ud800" in value


@pytest.mark.parametrize(
    ("value", "is_name"),
    [
        *((name, True) for name in ("a/b.png", "a..b", "...")),
        *((name, False) for name in ("", "..", "a/../b", "/a", "a//b", "./a", "a\0", 3)),
    ],
)
def test_names_stay_inside_their_folder(value, is_name):
    assert json_forms.is_name(value) == is_name


def test_a_text_that_is_nested_too_deeply_is_a_value_error():
    with pytest.raises(ValueError, match="nested"):
        fileio.parse_json("[" * 100_000)
