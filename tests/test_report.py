"""The report of a run: in progress, finished, and with missing files."""

import html.parser
import io
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from semiseg_jax import (
    eval_protocol,
    fitted_settings,
    mesh,
    metrics,
    results,
    self_training,
    stages,
)
from semiseg_jax.data import image_io
from semiseg_jax.data.dataset import Dataset, Example
from semiseg_jax.evaluate import EvalExample
from semiseg_jax.reporting import artifacts, drawings, galleries
from semiseg_jax.reporting import page as page_lib
from semiseg_jax.reporting import plots as plots_lib
from semiseg_jax.reporting.run import Run, StageReport
from semiseg_jax.runtime import metric_writer
from semiseg_jax.runtime.logger import capture_lines
from tests import json_mutants, workdirs
from tests.conftest import tiny_config
from tests.errors import raises_code
from tests.rows import PROTOCOL, result_row

SECTIONS = ("results", "classes", "curves", "confusion", "gallery", "pseudo", "health", "norms")
# Tags without an end tag.
VOID = {"meta", "link", "img", "br"}


class Page(html.parser.HTMLParser):
    """References, images and text of a page, by section and table."""

    def __init__(self, text):
        super().__init__()
        self.references, self.ids, self.tags, self.images = [], [], set(), {}
        self.tables, self.text, self.classes = {}, {}, set()
        self._open, self._section = [], ""
        self.feed(text)
        assert self._open == [], "unclosed tags"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.classes |= {attributes.get("class")}
        self.references += [
            attributes[k] for k in ("src", "href", "srcset", "data") if k in attributes
        ]
        if tag not in VOID:
            self._open.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "section":
            self._section = attributes["id"]
            self.tables[self._section], self.text[self._section] = [], ""
            self.images[self._section] = []
        if tag == "img":
            self.images[self._section].append(attributes["alt"])
        if tag == "table":
            self.tables[self._section].append([])
        if tag == "tr":
            self.tables[self._section][-1].append([])
        if tag in ("td", "th"):
            self.tables[self._section][-1][-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._section:
            self.text[self._section] += data
        if "td" in self._open or "th" in self._open:
            self.tables[self._section][-1][-1][-1] += data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir of two rounds with a control, and its page after each stage and at the end."""
    workdir = epath.Path(tmp_path_factory.mktemp("report")) / "run"
    config = tiny_config(
        model__head="v2",
        data__name="streets",
        data__crop=(24, 32),
        data__streets_size=(24, 40),
        data__streets_train=10,
        data__streets_val=7,
        data__labels=4.0,
        data__cache_dir=str(workdir.parent / "cache"),
        train__batch_labeled=2,
        train__batch_unlabeled=2,
        train__log_every=1,
        rounds__count=2,
        rounds__control=True,
        eval__every=2,
        eval__batch=2,
        pseudo__batch=2,
        sda__ops=("solarize",),
        pseudo__flip=False,
    )
    pages = []
    make, write = mesh.make_mesh, page_lib.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "make_mesh", lambda: make(jax.devices()[:1]))
        patch.setattr(self_training, "SECONDS_BETWEEN_REPORTS", 0.0)
        # Each call of `report.write` overwrites the page, so collect every version.
        patch.setattr(
            page_lib,
            "write",
            lambda folder: (write(folder), pages.append((folder / page_lib.FILE).read_text())),
        )
        self_training.run(config, workdir)
    return workdir, [Page(page) for page in pages]


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the workdir without checkpoints, to delete files from."""
    shutil.copytree(run[0], tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))
    return epath.Path(tmp_path / "copy")


@pytest.fixture
def unrendered(monkeypatch):
    """Plots are computed and not rendered, which takes seconds a page: for tests of the text."""
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>'
    monkeypatch.setattr(plots_lib, "_svg", lambda canvas: svg)


def test_each_page_is_self_contained_and_has_every_section(run):
    workdir, pages = run
    assert len(pages) == 5
    for page in pages:
        assert [id_ for id_ in page.ids if id_ in SECTIONS] == list(SECTIONS)
        assert all(target.startswith(("data:", "#")) for target in page.references)
        assert {target[1:] for target in page.references if target.startswith("#")} <= set(page.ids)
        assert not page.tags & {"script", "iframe", "object", "embed", "form", "base"}
    text = (workdir / page_lib.FILE).read_text()
    assert not re.search(r"https?:|url\(|@import", text)
    assert len(text) < 5e6


@pytest.mark.parametrize("number, done", [(0, 1), (1, 2), (2, 3), (3, 4)])
def test_numbers_equal_those_of_the_result_rows(run, number, done):
    workdir, pages = run
    rows = workdirs.rows(workdir)[:done]
    head, *lines = pages[number].tables["results"][0]
    assert [line[:2] for line in lines] == [
        [f"{r['stage']} {r['round']}".replace("teacher 0", "teacher"), f"{100 * r['miou']:.2f}"]
        for r in rows
    ]
    column = head.index("gain over the teacher")
    assert [line[column] for line in lines] == [
        "",
        *(f"{100 * (r['miou'] - rows[0]['miou']):+z.2f}" for r in rows[1:]),
    ]
    _, *by_class = pages[number].tables["classes"][0]
    for i, line in enumerate(by_class):
        texts = ["–" if r["iou"][i] is None else f"{100 * r['iou'][i]:.1f}" for r in rows]
        assert line[1 : 1 + done] == texts
    assert len(by_class) == len(rows[0]["iou"])


def test_the_gain_over_the_control_compares_equal_numbers_of_steps(run):
    workdir, pages = run
    _, _, student, control = workdirs.rows(workdir)
    head, *lines = pages[-1].tables["results"][0]
    column = head.index("gain over the control")
    gain = f"{100 * (student['miou'] - control['miou']):+z.2f}"
    assert [line[column] for line in lines] == ["", "", gain, ""]


def test_a_page_in_progress_names_missing_content(run):
    _, (first, *_, last) = run
    assert "No student with a weak and a strong norm has finished yet." in first.text["norms"]
    assert "No pseudo-labels have been made yet." in first.text["pseudo"]
    assert len(first.tables["results"][0]) == 2
    # image, label, teacher, correct or wrong
    assert len(first.images["gallery"]) % 4 == 0 and first.images["gallery"]
    assert not any("yet" in last.text[s] for s in SECTIONS)
    # image, label, teacher, two students, their difference
    assert len(last.images["gallery"]) % 6 == 0
    for title in ("mIoU on the evaluation set, %", "learning rate of the backbone"):
        assert title in last.images["curves"]
    assert len(last.images["norms"]) == artifacts.NUM_LAYERS


def test_stored_predictions_add_up_to_the_result_row(run):
    workdir, _ = run
    row = workdirs.rows(workdir)[2]
    evaluation = json.loads((workdir / "round_2/student" / artifacts.EVALUATION).read_text())
    miou = np.nanmean(metrics.iou(np.array(evaluation["confusion"])))
    np.testing.assert_allclose(miou, row["miou"])
    assert np.sum(evaluation["confusion"]) == row["pixels"]
    assert len(evaluation["miou_by_image"]) == len(evaluation["kept"]) == 7
    for name, miou in evaluation["miou_by_image"].items():
        truth, predicted = (
            np.asarray(Image.open(folder / f"{name}.png"))
            for folder in (
                workdir / artifacts.GALLERY / evaluation["gallery"],
                workdir / "round_2/student" / artifacts.PREDICTIONS,
            )
        )
        valid = truth != 255
        classes = np.union1d(truth[valid], predicted[valid])
        iou = [
            ((truth == c) & (predicted == c))[valid].sum()
            / ((truth == c) | (predicted == c))[valid].sum()
            for c in classes
        ]
        np.testing.assert_allclose(miou, np.mean(iou))


def test_tensorboard_has_examples_and_both_norms_of_each_evaluation(run):
    workdir, _ = run
    steps = {"images": [], "histograms": []}
    folder = workdir / "round_1" / "student"
    for path in sorted(folder.glob("events.*")):
        events = EventAccumulator(str(path), {"tensors": 0})
        events.Reload()
        for tag in events.Tags()["tensors"]:
            if tag.startswith(f"{artifacts.GALLERY}/"):
                steps["images"] += [(tag, e.step) for e in events.Tensors(tag)]
            if tag.startswith("norm/"):
                steps["histograms"] += [(tag, e.step) for e in events.Tensors(tag)]
    assert len({tag for tag, _ in steps["images"]}) == artifacts.NUM_EXAMPLES
    names = {tag.rpartition("/")[::2] for tag, _ in steps["histograms"]}
    assert {domain for _, domain in names} == {"weak", "strong"}
    assert len(names) == artifacts.NUM_LAYERS * 4 * 2
    assert {step for _, step in (*steps["images"], *steps["histograms"])} == {2, 4}


@pytest.mark.usefixtures("unrendered")
def test_missing_files_are_named(copied):
    for path in (
        artifacts.RUN,
        f"round_2/student/{artifacts.EVALUATION}",
        f"round_1/student/{metric_writer.METRICS_FILE}",
    ):
        (copied / path).unlink()
    (copied / "round_0/teacher" / artifacts.EVALUATION).write_text("{")
    for folder in copied.glob(f"*/*/{artifacts.PREDICTIONS}"):
        shutil.rmtree(folder)
    missing = page_lib.write(copied)
    assert missing == [
        "run.json is missing: start the run again to list data and devices here.",
        "metrics.jsonl is missing for student 1.",
    ]
    page = Page((copied / page_lib.FILE).read_text())
    assert "not stored" in page.text["gallery"]
    (copied / "results.json").unlink()
    assert "No results yet: no stage has finished." in page_lib.write(copied)


def test_the_first_thing_on_the_page_is_what_was_kept(run, copied):
    workdir, pages = run
    kept = json.loads((workdir / "model/model.json").read_text())["kept"]
    assert " on the 7 evaluation images (95 % interval over images: " in kept["sentence"]
    assert kept["sentence"].endswith("): model/ has student 2 (rounds.keep = last).")
    text = (workdir / page_lib.FILE).read_text()
    assert re.search(r"<h1>.*</h1>\s*<p class=\"verdict\">(.*)</p>", text)[1] == kept["sentence"]
    # Before the end of a run nothing is kept.
    assert ["verdict" in page.classes for page in pages] == [False] * 4 + [True]


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize("change", ["older code", "fewer rounds", "not over", "no model"])
def test_a_page_does_not_say_what_was_kept_before(copied, change):
    path = copied / "model/model.json"
    content = json.loads(path.read_text())
    if change == "older code":
        del content["kept"]
    elif change == "fewer rounds":
        content["kept"]["rounds"] = 1
    path.write_text(json.dumps(content))
    if change == "not over":
        (copied / "round_2/control" / stages.DONE).unlink()
    elif change == "no model":
        shutil.rmtree(copied / "model")
    page_lib.write(copied)
    assert "verdict" not in Page((copied / page_lib.FILE).read_text()).classes


SIZES = "Chosen from 12 images of 40x24: crops of 32x24."
MINUTES = "Fitted to 60 minutes: teacher 4 steps; about 55 min on this machine."


@pytest.fixture
def fitted(copied):
    """The copy of a run that chose settings by itself; `rounds.count` was changed since."""
    config = json.loads((copied / "config.json").read_text())
    given = tiny_config(data__crop=(), train__steps=20_000, rounds__count=3)
    assert config["rounds"]["count"] == 2
    given = fitted_settings.record(copied, given, {"data.crop": (24, 32)}, SIZES)
    steps = config["train"]["steps"]
    fitted_settings.record(copied, given, {"train.steps": steps, "rounds.count": 1}, MINUTES, 60)
    return copied


@pytest.mark.usefixtures("unrendered")
def test_settings_that_the_run_chose_stand_with_their_reason(fitted):
    page_lib.write(fitted)
    page = Page((fitted / page_lib.FILE).read_text())
    of_sizes, of_minutes = [t for t in page.tables["ran"] if t[0][1] == "chosen"]
    assert of_sizes == [
        ["key", "chosen", "in the given config"],
        ["data.crop", "[24, 32]", "[]"],
    ]
    # The present rounds.count was given later.
    assert of_minutes[1:] == [["train.steps", "4", "20000"]]
    text = page.text["ran"]
    assert text.index(SIZES) < text.index("data.crop") < text.index(MINUTES)


@pytest.mark.usefixtures("unrendered")
def test_settings_without_a_reason_are_of_older_code(fitted):
    path = fitted / fitted_settings.FITTED
    content = json.loads(path.read_text())
    for setting in content["settings"].values():
        del setting["reason"]
    path.write_text(json.dumps(content))
    page_lib.write(fitted)
    text = Page((fitted / page_lib.FILE).read_text()).text["ran"]
    assert text.count("Older code did not record the reason.") == 1


def test_a_page_without_chosen_settings_names_none(run, fitted):
    assert "chose by itself" not in run[1][-1].text["ran"]
    (fitted / fitted_settings.FITTED).write_text("{")
    (sentence,) = page_lib.write(fitted)
    assert sentence.startswith("fitted.json is damaged")
    assert sentence in Page((fitted / page_lib.FILE).read_text()).text["ran"]


def test_a_folder_without_a_run_raises(tmp_path):
    with raises_code("report-config-missing"):
        page_lib.write(tmp_path)


@pytest.mark.usefixtures("unrendered")
def test_each_protocol_has_its_own_results_table(copied):
    content = json.loads((copied / "results.json").read_text())
    flipped = dict(content["rows"][0], miou=0.5)
    flipped["protocol"] = flipped["protocol"] | {"flip": True}
    content["rows"].append(flipped)
    (copied / "results.json").write_text(json.dumps(content))
    (copied / results.ROW_HASHES).unlink()  # Otherwise a row that no run wrote is left out.
    page_lib.write(copied)
    newest, oldest = Page((copied / page_lib.FILE).read_text()).tables["results"]
    assert [line[:2] for line in newest[1:]] == [["teacher", "50.00"]]
    assert len(oldest) == 5


@pytest.mark.usefixtures("unrendered")
def test_a_changed_row_is_left_out(copied):
    content = json.loads((copied / "results.json").read_text())
    content["rows"][1]["miou"] = 0.99
    (copied / "results.json").write_text(json.dumps(content))
    page_lib.write(copied)
    (table,) = Page((copied / page_lib.FILE).read_text()).tables["results"]
    assert len(table) == 4 and "99.00" not in str(table)


def test_images_are_selected_by_the_last_stage_and_by_their_change():
    def stage(number, **scores):
        schedule = stages.schedule(tiny_config(rounds__count=2), "unused")
        evaluation = {"kept": [*scores], "miou_by_image": scores}
        return StageReport(number, schedule[1 + number], 0, True, evaluation)

    first = stage(0, a=0.1, b=0.2, c=0.3, d=0.4, e=0.9, f=0.9, g=0.5, h=0.5)
    last = stage(1, a=0.8, b=0.3, c=0.4, d=0.5, e=0.6, f=0.7, g=0.1, h=None)
    assert galleries.select_images(first, last) == {
        "a": ["best", "largest gain"],
        "f": ["best"],
        "c": ["median"],
        "d": ["median"],
        "g": ["worst", "largest loss"],
        "b": ["worst"],
    }
    assert list(galleries.select_images(first, first))[:2] == ["f", "e"]
    # The smallest loss is no gain, and the smallest gain no loss.
    worse, better = stage(1, a=0.05, b=0.1), stage(1, a=0.2, b=0.4)
    assert galleries.select_images(first, worse)["a"][-1] == "worst"
    assert galleries.select_images(first, better)["a"][-1] == "worst"


def test_the_labels_of_a_plot_fit_into_it(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots_lib, "_svg", lambda canvas: drawn.append(canvas) or b"")
    line = plots_lib.Curve("teacher", plots_lib.COLOURS[0], False, [(6, 0.003), (10, 0.0043)])
    plots_lib.plot_curves("learning rate of the backbone", [line])
    (axes,) = drawn[0].axes
    assert "0.00425" in [label.get_text() for label in axes.get_yticklabels()]
    assert axes.get_tightbbox().x0 >= 0


def test_differences_have_a_colour_per_case():
    truth = np.array([[1, 1, 1, 1, 255]], np.uint8)
    earlier, later = np.array([[[1, 0, 1, 0, 1]], [[1, 1, 0, 0, 1]]], np.uint8)
    png = plots_lib.plot_differences(truth, earlier, later)
    colours = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))[0]
    np.testing.assert_array_equal(colours, [*plots_lib.DIFFERENCES.values(), (255, 255, 255)])


def test_the_contact_sheet_has_images_labels_and_predictions_of_two_stages(run, copied):
    workdir, _ = run
    evaluation = json.loads((workdir / "round_2/student" / artifacts.EVALUATION).read_text())
    colours = np.full((256, 3), 255)
    palette = json.loads((workdir / artifacts.RUN).read_text())["palette"]
    colours[: len(palette)] = palette
    sheet = np.asarray(Image.open(io.BytesIO(galleries.picture(workdir))))
    top = 23  # height of the titles; below are images of 24x40, 6 pixels apart
    for row, name in enumerate(evaluation["kept"][::2]):
        for column, folder in (
            (1, workdir / artifacts.GALLERY / evaluation["gallery"]),
            (2, workdir / "round_0/teacher" / artifacts.PREDICTIONS),
            (3, workdir / "round_2/student" / artifacts.PREDICTIONS),
        ):
            ids = np.asarray(Image.open(folder / f"{name}.png"))
            y, x = top + row * 30, column * 46
            np.testing.assert_array_equal(sheet[y : y + 24, x : x + 40], colours[ids])
    for stage in ("round_0/teacher", "round_1/student", "round_2/student"):
        (copied / stage / "DONE").unlink()
    with raises_code("finished-stage-missing"):
        galleries.picture(copied)


def test_the_norms_of_the_last_student_as_one_picture(run, copied):
    workdir, _ = run
    layers = json.loads((workdir / "round_2/student" / artifacts.NORMS).read_text())
    plots = [Image.open(io.BytesIO(plots_lib.plot_norms(name, v))) for name, v in layers.items()]
    row = np.asarray(Image.open(io.BytesIO(drawings.norms_picture(workdir))))
    expected = np.concatenate([np.asarray(image.convert("RGB")) for image in plots], axis=1)
    np.testing.assert_array_equal(row, expected)
    for round_ in (1, 2):
        (copied / f"round_{round_}/student/DONE").unlink()
    with raises_code("norms-missing"):
        drawings.norms_picture(copied)


@pytest.mark.parametrize("select, named", [("last", False), ("holdout", True)])
def test_the_title_of_the_miou_plot_names_selected_weights(tmp_path, select, named):
    row = result_row(PROTOCOL | {"selection": eval_protocol.SELECTIONS[select]})
    folder = epath.Path(tmp_path)
    (stage,) = stages.schedule(tiny_config(rounds__count=0), folder)
    stage = StageReport(0, stage, 0, True, None)
    (picture,) = drawings.curves(Run(folder, {}, None, [row], [], [stage]))["pictures"]
    assert picture["title"].startswith("mIoU")
    assert ("selected weights" in picture["title"]) == named


@pytest.mark.parametrize("domains", [("weak", "strong"), ("weak",)])
def test_norms_are_of_layers_from_the_first_to_the_last(domains):
    names = ("exit2", "middle10", "middle2", "stem2", "entry1", "stem", "middle1")

    def layers(values):
        return {name: {"norm": values} for name in names}

    moments = {"mean": np.zeros(3), "var": np.ones(3)}
    affine = {"strong": {"scale": np.ones(3), "bias": np.zeros(3)}} if len(domains) > 1 else {}
    affine |= {"weak": {"scale": np.ones(3), "bias": np.zeros(3)}}
    stats = {f"batch_stats_{d}": {"backbone": layers(moments), "head": moments} for d in domains}
    norms = artifacts.norm_statistics({"params": {"backbone": layers(affine)}, **stats})
    # 4 of 7: stem, stem2, entry1, middle1, middle2, middle10, exit2.
    expected = ["stem", "entry1", "middle2", "exit2"]
    assert list(norms) == [f"backbone/{name}/norm" for name in expected]
    assert all(set(by_domain) == set(domains) for v in norms.values() for by_domain in v.values())


def write_mutant(path, rng):
    """Replaces a JSON file, or a line of a .jsonl file, by JSON of another form."""
    text = path.read_text()
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    lines[0] = rng.choice(list(json_mutants.mutants(json.loads(lines[0]))))
    path.write_bytes("\n".join(lines).encode(errors="surrogatepass"))


JSON_FILES = (
    *("results.json", artifacts.RUN, "model/model.json"),
    *("round_2/student/" + name for name in (artifacts.EVALUATION, artifacts.NORMS)),
    *("round_0/teacher/" + name for name in (artifacts.EVALUATION, metric_writer.METRICS_FILE)),
    f"round_1/student/{artifacts.PSEUDO_GALLERY}.json",
    "round_1/student/pseudo_labels/health.json",
)


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))]
)
def test_json_of_any_form_ends_no_report(run, copied, seed):
    rng = random.Random(seed)
    for name in JSON_FILES if seed % 2 else rng.choices(JSON_FILES):
        write_mutant(copied / name, rng)
    page_lib.write(copied)
    Page((copied / page_lib.FILE).read_text())


def test_a_report_that_cannot_be_written_is_a_warning(copied):
    (copied / "config.json").write_text("[]")
    with capture_lines() as lines:
        page_lib.update(copied)
    assert len(lines) == 1 and lines[0].startswith(f"Warning: {copied}/report.html could not be")
    with raises_code("report-config-missing", "config.json"):
        page_lib.write(copied)


@pytest.mark.parametrize("name", [r"$\foo$", "a_$^b", "$", r"\$x\$", "%\n{}"])
def test_class_names_are_no_formulas(name):
    svg = plots_lib.plot_confusion(np.eye(2, dtype=np.int64), [name, "other"])
    assert svg.startswith(b"<?xml")


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline"])
def test_any_backend_in_the_environment_is_ignored(backend):
    """Keras, which TensorFlow imports, imports Matplotlib too."""
    code = "from semiseg_jax.runtime.quiet_tensorflow import tf; import semiseg_jax.reporting.plots"
    environment = os.environ | {"MPLBACKEND": backend}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_matplotlib_is_imported_in_one_place():
    sources = pathlib.Path(page_lib.__file__).parents[1].rglob("*.py")
    pattern = re.compile(r"^\s*(from|import) matplotlib", re.M)
    importing = {path.name for path in sources if pattern.search(path.read_text())}
    assert importing == {"plain_matplotlib.py"}


def test_the_gallery_shows_the_masks_of_the_last_evaluation(tmp_path):
    """The masks may have been corrected under the same names."""
    example = Example("a", "a.png", "a_mask.png")
    palette = ((0, 0, 0), (255, 0, 0))
    table = image_io.id_table(2)
    dataset = Dataset("d", ("sky", "tree"), palette, table, (), (), (example,))
    workdir = epath.Path(tmp_path)
    for class_id in (0, 1):
        label = np.full((4, 5), class_id, np.uint8)
        sink = artifacts.PredictionSink(workdir, workdir / "stage", dataset, final=True)
        sink(EvalExample("a", np.zeros((4, 5, 3), np.uint8), label, label))
        shown = workdir / artifacts.GALLERY / dataset.split_hash / "a.png"
        assert (image_io.read_mask(shown, table) == class_id).all()
