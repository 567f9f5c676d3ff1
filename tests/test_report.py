"""The page of a run: as it goes on, at its end, and with pieces missing."""

import html.parser
import io
import json
import re
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from semiseg_jax import evaluate, figures, history, mesh, metrics, record, report, rounds
from semiseg_jax.errors import UserError
from semiseg_jax.reporting import drawings, galleries
from semiseg_jax.reporting.run import Run, Stage
from tests import workdirs
from tests.conftest import tiny_config

SECTIONS = ("results", "classes", "curves", "confusion", "gallery", "pseudo", "health", "norms")
# Tags that need no end.
VOID = {"meta", "link", "img", "br"}


class Page(html.parser.HTMLParser):
    """What a page refers to, and the text of its sections and tables."""

    def __init__(self, text):
        super().__init__()
        self.refers, self.ids, self.tags, self.images = [], [], set(), {}
        self.tables, self.text = {}, {}
        self._open, self._section = [], ""
        self.feed(text)
        assert self._open == [], "tags that are not closed"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.refers += [attributes[k] for k in ("src", "href", "srcset", "data") if k in attributes]
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
    make, write = mesh.make_mesh, report.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "make_mesh", lambda: make(jax.devices()[:1]))
        # What a process that goes on would leave: the page as it stood then.
        patch.setattr(
            report,
            "write",
            lambda where: (write(where), pages.append((where / report.FILE).read_text())),
        )
        rounds.run(config, workdir)
    return workdir, [Page(page) for page in pages]


@pytest.fixture
def copied(run, tmp_path):
    """The workdir, to take pieces out of."""
    shutil.copytree(run[0], tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))
    return epath.Path(tmp_path / "copy")


def test_each_page_stands_alone_and_has_every_section(run):
    workdir, pages = run
    assert len(pages) == 5
    for page in pages:
        assert [id_ for id_ in page.ids if id_ in SECTIONS] == list(SECTIONS)
        assert all(target.startswith(("data:", "#")) for target in page.refers)
        assert {target[1:] for target in page.refers if target.startswith("#")} <= set(page.ids)
        assert not page.tags & {"script", "iframe", "object", "embed", "form", "base"}
    text = (workdir / report.FILE).read_text()
    assert not re.search(r"https?:|url\(|@import", text)
    assert len(text) < 5e6


@pytest.mark.parametrize("number, done", [(0, 1), (1, 2), (2, 3), (3, 4)])
def test_numbers_are_those_of_the_results(run, number, done):
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


def test_the_gain_over_the_control_is_that_of_the_same_length(run):
    workdir, pages = run
    _, _, student, control = workdirs.rows(workdir)
    head, *lines = pages[-1].tables["results"][0]
    column = head.index("gain over the control")
    gain = f"{100 * (student['miou'] - control['miou']):+z.2f}"
    assert [line[column] for line in lines] == ["", "", gain, ""]


def test_a_page_in_progress_says_what_is_to_come(run):
    _, (first, *_, last) = run
    assert "No student with a weak and a strong norm has ended yet." in first.text["norms"]
    assert "No pseudo-labels have been made yet." in first.text["pseudo"]
    assert len(first.tables["results"][0]) == 2
    # image, truth, teacher, right or wrong
    assert len(first.images["gallery"]) % 4 == 0 and first.images["gallery"]
    assert not any("have" in last.text[s] and "yet" in last.text[s] for s in SECTIONS)
    # image, truth, teacher, two students, their difference
    assert len(last.images["gallery"]) % 6 == 0
    for title in ("mIoU on the evaluation set, %", "learning rate of the backbone"):
        assert title in last.images["curves"]
    assert len(last.images["norms"]) == record.LAYERS


def test_what_is_kept_of_an_evaluation_adds_up_to_its_row(run):
    workdir, _ = run
    row = workdirs.rows(workdir)[2]
    kept = json.loads((workdir / "round_2/student" / record.EVALUATION).read_text())
    np.testing.assert_allclose(np.nanmean(metrics.iou(np.array(kept["confusion"]))), row["miou"])
    assert np.sum(kept["confusion"]) == row["pixels"]
    assert len(kept["miou_by_image"]) == len(kept["kept"]) == 7
    for name, miou in kept["miou_by_image"].items():
        truth, predicted = (
            np.asarray(Image.open(folder / f"{name}.png"))
            for folder in (
                workdir / record.GALLERY / kept["gallery"],
                workdir / "round_2/student" / record.PREDICTIONS,
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


def test_tensorboard_has_the_examples_and_both_norms_at_each_evaluation(run):
    workdir, _ = run
    steps = {"images": [], "histograms": []}
    folder = workdir / "round_1" / "student"
    for path in sorted(folder.glob("events.*")):
        events = EventAccumulator(str(path), {"tensors": 0})
        events.Reload()
        for tag in events.Tags()["tensors"]:
            if tag.startswith(f"{record.GALLERY}/"):
                steps["images"] += [(tag, e.step) for e in events.Tensors(tag)]
            if tag.startswith("norm/"):
                steps["histograms"] += [(tag, e.step) for e in events.Tensors(tag)]
    assert len({tag for tag, _ in steps["images"]}) == record.EXAMPLES
    names = {tag.rpartition("/")[::2] for tag, _ in steps["histograms"]}
    assert {domain for _, domain in names} == {"weak", "strong"}
    assert len(names) == record.LAYERS * 4 * 2
    assert {step for _, step in (*steps["images"], *steps["histograms"])} == {2, 4}


def test_missing_pieces_are_sentences(copied):
    for path in (
        record.RUN,
        f"round_2/student/{record.EVALUATION}",
        f"round_1/student/{history.FILE}",
    ):
        (copied / path).unlink()
    (copied / "round_0/teacher" / record.EVALUATION).write_text("{")
    for folder in copied.glob(f"*/*/{record.PREDICTIONS}"):
        shutil.rmtree(folder)
    missing = report.write(copied)
    assert missing == [
        "run.json is missing: start the run again to have data and devices here.",
        "metrics.jsonl is missing for student 1.",
    ]
    page = Page((copied / report.FILE).read_text())
    assert "not kept" in page.text["gallery"]
    (copied / "results.json").unlink()
    assert "No stage has ended yet: there is no result." in report.write(copied)


def test_without_a_run_there_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json: give the --workdir of a run"):
        report.write(tmp_path)


def test_results_of_another_protocol_have_a_table_of_their_own(copied):
    content = json.loads((copied / "results.json").read_text())
    flipped = dict(content["rows"][0], miou=0.5)
    flipped["protocol"] = flipped["protocol"] | {"flip": True}
    content["rows"].append(flipped)
    (copied / "results.json").write_text(json.dumps(content))
    report.write(copied)
    one, other = Page((copied / report.FILE).read_text()).tables["results"]
    assert [line[:2] for line in one[1:]] == [["teacher", "50.00"]]
    assert len(other) == 5


def test_images_are_chosen_by_the_last_stage_and_by_what_changed():
    def stage(number, **scores):
        return Stage(
            number,
            "student",
            number,
            0,
            epath.Path(),
            True,
            {"kept": [*scores], "miou_by_image": scores},
        )

    first = stage(0, a=0.1, b=0.2, c=0.3, d=0.4, e=0.9, f=0.9, g=0.5, h=0.5)
    last = stage(1, a=0.8, b=0.3, c=0.4, d=0.5, e=0.6, f=0.7, g=0.1, h=None)
    assert galleries.chosen(first, last) == {
        "a": ["best", "gained most"],
        "f": ["best"],
        "c": ["median"],
        "d": ["median"],
        "g": ["worst", "lost most"],
        "b": ["worst"],
    }
    assert list(galleries.chosen(first, first))[:2] == ["f", "e"]


def test_a_restart_does_a_step_again_and_history_has_it_once(tmp_path):
    folder = epath.Path(tmp_path)
    kept = history.History(folder, 0)
    for step in (2, 4, 6):
        kept.add(step, {"loss": step, "worst": float("nan")})
    again = history.History(folder, 4)
    again.add(6, {"loss": 60})
    assert [(line["step"], line["loss"]) for line in history.read(folder)] == [
        (2, 2),
        (4, 4),
        (6, 60),
    ]
    assert all("worst" not in line for line in history.read(folder))


def test_differences_have_a_colour_for_each_case():
    truth = np.array([[1, 1, 1, 1, 255]], np.uint8)
    earlier, later = np.array([[[1, 0, 1, 0, 1]], [[1, 1, 0, 0, 1]]], np.uint8)
    png = figures.differences(truth, earlier, later)
    colours = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))[0]
    np.testing.assert_array_equal(colours, [*figures.DIFFERENCES.values(), (255, 255, 255)])


def test_the_picture_has_images_truth_and_what_two_stages_see(run, copied):
    workdir, _ = run
    evaluation = json.loads((workdir / "round_2/student" / record.EVALUATION).read_text())
    colours = np.full((256, 3), 255)
    palette = json.loads((workdir / record.RUN).read_text())["palette"]
    colours[: len(palette)] = palette
    sheet = np.asarray(Image.open(io.BytesIO(galleries.picture(workdir))))
    top = 23  # The titles; images of 24x40 below them, with 6 pixels between.
    for row, name in enumerate(evaluation["kept"][::2]):
        for column, folder in (
            (1, workdir / record.GALLERY / evaluation["gallery"]),
            (2, workdir / "round_0/teacher" / record.PREDICTIONS),
            (3, workdir / "round_2/student" / record.PREDICTIONS),
        ):
            ids = np.asarray(Image.open(folder / f"{name}.png"))
            y, x = top + row * 30, column * 46
            np.testing.assert_array_equal(sheet[y : y + 24, x : x + 40], colours[ids])
    for stage in ("round_0/teacher", "round_1/student", "round_2/student"):
        (copied / stage / "DONE").unlink()
    with pytest.raises(UserError, match="has no stage that has ended"):
        galleries.picture(copied)


def test_the_norms_of_the_last_student_can_be_had_as_one_picture(run, copied):
    workdir, _ = run
    kept = json.loads((workdir / "round_2/student" / record.NORMS).read_text())
    drawn = [Image.open(io.BytesIO(figures.norms(layer, v))) for layer, v in kept.items()]
    row = np.asarray(Image.open(io.BytesIO(drawings.norms_picture(workdir))))
    expected = np.concatenate([np.asarray(image.convert("RGB")) for image in drawn], axis=1)
    np.testing.assert_array_equal(row, expected)
    for round_ in (1, 2):
        (copied / f"round_{round_}/student/DONE").unlink()
    with pytest.raises(UserError, match="No student with a weak and a strong norm has ended yet"):
        drawings.norms_picture(copied)


@pytest.mark.parametrize("select, said", [("last", False), ("holdout", True)])
def test_a_curve_says_that_its_last_point_is_of_chosen_weights(tmp_path, select, said):
    protocol = dict.fromkeys(evaluate.COMPARED, "any") | {"selection": evaluate.SELECTIONS[select]}
    row = {"stage": "teacher", "round": 0, "step": 4, "miou": 0.5, "protocol": protocol}
    folder = epath.Path(tmp_path)
    stage = Stage(0, "teacher", 0, 0, folder, True, None)
    (picture,) = drawings.curves(Run(folder, {}, None, [row], [], [stage]))["pictures"]
    assert picture["title"].startswith("mIoU")
    assert ("of the weights that were chosen" in picture["title"]) == said


@pytest.mark.parametrize("domains", [("weak", "strong"), ("weak",)])
def test_the_layers_of_a_norm_go_from_the_first_to_the_last(domains):
    names = ("exit2", "middle10", "middle2", "stem2", "entry1", "stem", "middle1")

    def layers(values):
        return {name: {"norm": values} for name in names}

    moments = {"mean": np.zeros(3), "var": np.ones(3)}
    affine = {"strong": {"scale": np.ones(3), "bias": np.zeros(3)}} if len(domains) > 1 else {}
    affine |= {"weak": {"scale": np.ones(3), "bias": np.zeros(3)}}
    stats = {f"batch_stats_{d}": {"backbone": layers(moments), "head": moments} for d in domains}
    kept = record.norms({"params": {"backbone": layers(affine)}, **stats})
    # 4 of 7: stem, stem2, entry1, middle1, middle2, middle10, exit2.
    wanted = ["stem", "entry1", "middle2", "exit2"]
    assert list(kept) == [f"backbone/{name}/norm" for name in wanted]
    assert all(set(by_domain) == set(domains) for v in kept.values() for by_domain in v.values())
