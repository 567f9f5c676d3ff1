"""Readers of JSON files return a value of their form, or nothing."""

import json

import pytest
from etils import epath

from semiseg_jax import pseudo_label_stats, pseudo_labels
from semiseg_jax.reporting import artifacts
from semiseg_jax.runtime import fileio, json_forms, metric_writer
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
