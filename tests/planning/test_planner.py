"""Plans of configs, suggested changes, and the messages about plans that cannot be made."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from semiseg_jax.planning import chips, forecast, planner, programs, report, workload
from semiseg_jax.planning import suggestions as suggestions_lib
from semiseg_jax.planning.chips import CHIPS, Topology
from semiseg_jax.planning.programs import Cost, Memory, Program, TooLarge
from semiseg_jax.planning.workload import Workload
from tests.conftest import tiny_config
from tests.errors import raises_code

GB = 10**9


def streets_config(**changes):
    return tiny_config(
        data__name="streets", data__labels=16.0, data__streets_size=(32, 48), **changes
    )


def test_table_and_json_for_the_cpu(tmp_path, capsys, monkeypatch):
    # Two devices compile faster than all of them.
    two_devices = Topology("cpu", tuple(jax.devices()[:2]), 1, None)
    monkeypatch.setattr(chips, "topology", lambda name: two_devices)
    file = tmp_path / "plan.json"
    planner.run(streets_config(), ["cpu"], str(file), num_layers=12)
    printed = capsys.readouterr().out
    for text in (
        "16 labelled, 464 unlabelled, 120 evaluation",
        "memory, GiB",
        "all-reduces, MB",
        "decoder2",
    ):
        assert text in printed
    assert "chip-hours" not in printed  # no rates are published for this machine
    (plan,) = json.loads(file.read_text())
    step, labelling, evaluation = plan["programs"]
    assert [p["name"] for p in plan["programs"]] == [
        "student step", "labelling at 1", "evaluation at 1",
    ]  # fmt: skip
    assert step["fits"] and step["images"] == 16 and step["size"] == [32, 40]
    assert set(step["cost"]["collectives"]) == {"all-reduce"}
    # Labelling also predicts each mirrored image.
    assert labelling["cost"]["flops"] == 2 * evaluation["cost"]["flops"] > 0


def test_counts_and_sizes_are_read_from_present_data(folder_config):
    folder_config.data.downscale = 2
    load = workload.from_config(folder_config)
    assert (load.classes, load.labeled, load.unlabeled, load.evaluated) == (3, 4, 8, 5)
    assert load.evaluation_sizes == {(24, 18): 2, (18, 24): 3}
    assert not load.assumptions


@pytest.mark.parametrize(
    ("name", "changes", "counts", "size"),
    [
        ("cityscapes", {"labels": 372.0}, (372, 2603, 500), (1024, 2048)),
        ("cityscapes", {"labels": 0.0, "train_extra": True}, (2975, 19997, 500), (1024, 2048)),
        ("pascal_voc", {"labels": 1323.0}, (1323, 9259, 1449), (512, 512)),
        ("camvid", {"labels": 0.5, "unlabeled_ratio": 0.5}, (184, 92, 101), (360, 480)),
    ],
)
def test_missing_data_have_their_published_counts(tmp_path, name, changes, counts, size):
    config = tiny_config(data__name=name, data__root=str(tmp_path / "nothing"))
    config.data.update(changes)
    load = workload.from_config(config)
    assert (load.labeled, load.unlabeled, load.evaluated) == counts
    assert load.label_sizes == {size: counts[1]}
    assert load.assumptions[0].startswith("The data are not here")


def test_held_out_images_are_neither_labelled_nor_unlabelled(tmp_path):
    config = tiny_config(data__name="cityscapes", data__root=str(tmp_path / "nothing"))
    config.data.update({"labels": 372.0, "holdout": 0.25, "unlabeled_ratio": 2.0})
    config.eval.update({"every": 2, "select": "holdout"})
    load = workload.from_config(config)
    assert (load.labeled, load.unlabeled, load.selected) == (279, 558, 93)
    assert load.selection_sizes == {(1024, 2048): 93}


def test_held_out_images_of_present_data(folder_config):
    folder_config.data.holdout = 1.0 / 4
    folder_config.eval.update({"every": 2, "select": "holdout"})
    load = workload.from_config(folder_config)
    assert (load.labeled, load.unlabeled, load.evaluated, load.selected) == (3, 8, 5, 1)


def test_missing_data_without_published_counts(tmp_path):
    config = tiny_config(
        data__name="folder", data__classes=("a", "b"), data__root=str(tmp_path / "nothing")
    )
    with raises_code("data-folder-missing", "nothing"):
        workload.from_config(config)


@pytest.mark.parametrize("name", ["v5e", "v7:2x2", "v5e:4x4x", "tpu", "v5e:2,2"])
def test_an_unknown_topology(name):
    with raises_code("topology-unknown", f"--topology={name}", "v4, v5e, v5p, v6e"):
        chips.topology(name)


def test_a_missing_tpu_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with raises_code("tpu-compiler-missing", "libtpu=="):
        chips.topology("v5e:2x2")


def test_devices_that_do_not_divide_the_batch():
    with raises_code("batch-not-divisible", "train.batch_unlabeled is 12", "multiple of 8"):
        planner.run(streets_config(train__batch_unlabeled=12), ["cpu"])


def test_micro_batches_that_do_not_divide_the_batch():
    config = streets_config(train__batch_unlabeled=16, train__accumulate=3)
    config.train.batch_labeled = 24
    with raises_code("batch-not-divisible", "batch_unlabeled is 16", "8 devices, 3 times", "of 24"):
        planner.run(config, ["cpu"])


# ---- from costs to hours, against hand calculations

DEVICES = 4
V5E = CHIPS["v5e"]


def slice_of_four():
    """Only the number of its devices is used."""
    return Topology("v5e:2x2", tuple(jax.devices()[:DEVICES]), 1, V5E)


def cost(flops=0, traffic=0, reduced=0):
    return Cost(
        Memory(0, 0, 0),
        flops,
        flops,
        traffic,
        traffic,
        0,
        {"all-reduce": (1, reduced)},
        {},
        {},
        0.0,
    )


@pytest.mark.parametrize(
    ("resources", "seconds", "limited_by"),
    [
        ({"flops": 197e12, "traffic": 81.9 * GB}, 1.0, "arithmetic"),
        ({"flops": 19.7e12, "traffic": 1638 * GB}, 2.0, "memory"),
        # Reduce-scatter and all-gather each send three quarters of the bytes.
        ({"reduced": 400 * GB}, 2 * 0.75 * 400 / 200, "links"),
    ],
)
def test_the_bound_is_that_of_the_slowest_resource(resources, seconds, limited_by):
    roofline = forecast.roofline(cost(**resources), V5E, DEVICES)
    assert roofline.bound == pytest.approx(seconds)
    assert roofline.limited_by == limited_by


def test_hours_of_the_whole_schedule():
    config = tiny_config(rounds__count=3, rounds__control=True, eval__every=40)
    config.train.update({"steps": 100, "teacher_steps": 50})
    config.pseudo.scales = (1.0, 2.0)
    load = Workload(5, 10, 20, 30, {(10, 10): 17, (10, 5): 3}, {(10, 10): 30})
    one_second = cost(flops=197e12)
    compiled = [
        Program("student step", "tiny", 1.0, 16, (32, 40), one_second),
        Program("labelling", "tiny", 1.0, 8, (10, 10), one_second),
        Program("labelling", "tiny", 2.0, 8, (10, 10), one_second),
        Program("evaluation", "tiny", 1.0, 8, (10, 10), one_second),
    ]
    seconds = [item.seconds for item in forecast.schedule(config, load, compiled, slice_of_four())]
    assert seconds == pytest.approx(
        [
            50 / 2,  # a teacher step has half of the images of a student step
            3 * 100,
            3 * (3 + 1 / 2) * 2,  # three batches for 17 images, one for 3 images of half the size
            300 / 2,
            ((1 + 1) + 3 * (1 + 2) + (1 + 7)) * 4,  # at the end of each stage and within it
        ]
    )


@pytest.mark.parametrize(
    ("select", "held_out", "selection"),
    [
        # Each evaluation takes 4 batches for the 30 images, and for the 10 held-out images two
        # batches at the program's size and one at half of it.
        ("holdout", {(10, 10): 9, (10, 5): 1}, [((1 + 1) + 2 * (1 + 2)) * 2.5]),
        # One evaluation selects the weights and is reported.
        ("reported", {}, []),
    ],
)
def test_hours_of_weight_selection(select, held_out, selection):
    config = tiny_config(rounds__count=2, eval__every=40, eval__select=select, data__holdout=10)
    config.train.update({"steps": 100, "teacher_steps": 50})
    load = Workload(5, 10, 0, 30, {(10, 10): 0}, {(10, 10): 30}, held_out)
    one_second = cost(flops=197e12)
    compiled = [
        Program(kind, "tiny", 1.0, 8, (10, 10), one_second)
        for kind in ("student step", "labelling", "evaluation")
    ]
    seconds = [item.seconds for item in forecast.schedule(config, load, compiled, slice_of_four())]
    assert seconds[3:] == pytest.approx([((1 + 1) + 2 * (1 + 2)) * 4, *selection])


def test_a_single_student_of_another_network_labels_nothing():
    config = tiny_config(rounds__count=1, rounds__student_model="resnet18")
    config.train.update({"steps": 1, "teacher_steps": 1})
    load = Workload(5, 10, 20, 30, {(10, 10): 8}, {(10, 10): 8})
    compiled = [
        Program(kind, backbone, 1.0, 8, (10, 10), cost(flops=197e12))
        for kind, backbone in (
            ("student step", "resnet18"),
            ("teacher step", "tiny"),
            ("labelling", "tiny"),
            ("evaluation", "tiny"),
            ("evaluation", "resnet18"),
        )
    ]
    seconds = [item.seconds for item in forecast.schedule(config, load, compiled, slice_of_four())]
    assert seconds == pytest.approx([1, 1, 1, 1 + 1])


# ---- programs that do not fit


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
            20.5,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (19.59G) exceeds available HBM (15.75G).",
            19.59,
        ),
    ],
)
def test_out_of_memory_messages_of_the_compiler(message, needed):
    assert programs.parse_out_of_memory(message) == TooLarge(
        round(needed * 2**30), round(15.75 * 2**30)
    )


def fake_step(needed):
    """A compiler for 16 GiB; `needed` gives GiB by (remat, dtype, images per micro-batch)."""

    def compile_program(config):
        micro_batch = config.train.batch_labeled // config.train.accumulate
        key = (config.model.remat, config.model.compute_dtype, micro_batch)
        size = needed(*key) * 2**30
        memory = Memory(size, 0, size)
        fits = size < 2**34
        cost = Cost(memory, 1, 1, 1, 1, 0, {}, {}, {}, 0.0) if fits else TooLarge(size, 2**34)
        return Program("student step", "tiny", 1.0, 16, (32, 40), cost)

    return compile_program


def test_single_changes_are_all_tried_smallest_first():
    def needed(remat, dtype, batch):
        return 20 if (remat, dtype, batch) in ((False, "float32", 8), (True, "float32", 8)) else 10

    suggestions = suggestions_lib.try_changes(
        tiny_config(), "student step", fake_step(needed), slice_of_four(), 2**34
    )
    assert [(str(s), s.fits) for s in suggestions] == [
        ("--config.model.remat=True", False),
        ("--config.model.compute_dtype=bfloat16", True),
        ("--config.train.accumulate=2", True),
        ("--config.train.batch_labeled=4 --config.train.batch_unlabeled=4", True),
    ]


def test_smaller_batches_still_divide_into_micro_batches():
    config = tiny_config(train__batch_labeled=48, train__batch_unlabeled=16, train__accumulate=4)
    step = fake_step(lambda *_: 10)
    suggestions = suggestions_lib.try_changes(config, "student step", step, slice_of_four(), 2**34)
    # Half of 48 is no multiple of 4 devices times 4 micro-batches; half of 16 is too small.
    assert suggestions[-1].change == {"train.batch_labeled": 16}


def test_micro_batches_are_tried_before_fewer_images_and_fit():
    """12 images on 4 chips are 3 on each: two micro-batches do not divide them, three do."""
    config = tiny_config(train__batch_labeled=12, train__batch_unlabeled=12)
    step = fake_step(lambda remat, dtype, micro_batch: 20 if micro_batch > 6 else 10)
    suggestions = suggestions_lib.try_changes(config, "student step", step, slice_of_four(), 2**34)
    fit = [str(s) for s in suggestions if s.fits]
    assert fit == [
        "--config.train.accumulate=3",
        "--config.train.batch_labeled=4 --config.train.batch_unlabeled=4",
    ]


def test_batches_too_small_for_micro_batches():
    """Half of 8 images on 4 chips is one image per chip, which cannot be divided further."""

    def needed(remat, dtype, micro_batch):
        assert micro_batch >= 4
        return 20

    config = tiny_config()
    suggestions = suggestions_lib.try_changes(
        config, "student step", fake_step(needed), slice_of_four(), 2**34
    )
    changes = [set(s.change) for s in suggestions]
    both = {"train.accumulate", "train.batch_labeled"}
    assert {"train.accumulate"} in changes and not any(both <= change for change in changes)


def test_two_changes_are_combined_if_no_single_change_fits():
    def needed(remat, dtype, batch):
        return 40 // (1 + remat) // (1 + (dtype == "bfloat16")) * batch // 8

    suggestions = suggestions_lib.try_changes(
        tiny_config(), "student step", fake_step(needed), slice_of_four(), 2**34
    )
    assert [s.fits for s in suggestions] == [False, False, False, False, True]
    assert suggestions[-1].change == {"model.remat": True, "model.compute_dtype": "bfloat16"}


def test_the_smallest_change_is_printed(monkeypatch, capsys):
    """On a machine with too little memory, rematerialisation is compiled and suggested."""
    config = streets_config()
    topology = Topology("cpu", tuple(jax.devices()), 1, None)
    load = workload.from_config(config)
    sizes = {
        (False, "float32"): 3 * 2**30, (True, "float32"): 2**30, (False, "bfloat16"): 2**31,
    }  # fmt: skip

    def step(changed, *arguments):
        size = sizes[changed.model.remat, changed.model.compute_dtype]
        size //= 16 // (changed.train.batch_labeled + changed.train.batch_unlabeled)
        memory = Memory(size, 0, size)
        fake = Cost(memory, 1, 1, 1, None, 0, {}, {}, {}, 0.0)
        return Program("student step", "tiny", 1.0, 16, (32, 40), fake)

    monkeypatch.setattr(programs, "step_program", step)
    monkeypatch.setattr(programs, "inference_programs", lambda *arguments: iter(()))
    monkeypatch.setattr(planner, "_physical_memory", lambda: 2**30 + 1)
    plan = planner.make_plan(config, load, topology)
    report.print_plan(plan, None, "")
    printed = capsys.readouterr().out
    assert "student step with --config.model.compute_dtype=bfloat16: 2.00 GiB, does not" in printed
    assert printed.count("the smallest change that makes it fit: --config.model.remat=True") == 1


def test_an_unknown_size_is_printed_as_more(capsys):
    large = Program("student step", "tiny", 1.0, 16, (32, 40), TooLarge(0, 0))
    load = Workload(5, 10, 20, 30, {}, {})
    suggestions = {large.name: [suggestions_lib.Suggestion({"model.remat": True}, large, False)]}
    report.print_plan(
        report.Plan(slice_of_four(), load, 1, 2**34, (large,), suggestions, ()), None, ""
    )
    assert "with --config.model.remat=True: more GiB, does not fit" in capsys.readouterr().out


def test_numbers_unknown_without_machine_code_are_not_printed(capsys):
    counted = Cost(Memory(0, 0, 0), 1, None, None, 2 * GB, 0, {}, {}, {"stem": (3 * GB, 0)}, 0.0)
    program = Program("student step", "tiny", 1.0, 16, (32, 40), counted)
    load = Workload(5, 10, 20, 30, {}, {})
    plan = report.Plan(slice_of_four(), load, 1, 2**34, (program,), {}, ())
    report.print_plan(plan, None, "")
    printed = capsys.readouterr().out
    assert "Memory is without the programs' code" in printed
    assert "the compiler's figure" not in printed and "memory traffic" not in printed
    rows = [line.split() for line in printed.splitlines()]
    assert ["operands", "and", "results,", "GB", "3.00"] in rows
    assert ["floor", "of", "memory,", "ms", f"{2 * GB / V5E.memory_rate * 1e3:.2f}"] in rows


def test_step_only_compiles_the_step_and_counts_the_other_programs(monkeypatch, capsys):
    requests = []

    def step(config, kind, num_classes, topology, level):
        requests.append((kind, level))
        return Program("student step", "tiny", 1.0, 16, (32, 40), cost(flops=197e12))

    monkeypatch.setattr(programs, "step_program", step)
    compiled = []
    monkeypatch.setattr(programs, "_compile", compiled.append)
    monkeypatch.setattr(programs, "_compile_to_hlo", compiled.append)
    config = streets_config()
    load = workload.from_config(config)
    plan = planner.make_plan(config, load, slice_of_four(), step_only=True)
    assert requests == [("student", "optimised")] and not compiled
    counted = {p.kind: p.cost for p in plan.programs[1:]}
    # Labelling also predicts each mirrored image.
    assert counted["labelling"].flops == 2 * counted["evaluation"].flops > 0
    # 120 images in batches of 8, at the end of teacher and student.
    bound = counted["evaluation"].flops / V5E.flops
    assert plan.schedule[-1].seconds == pytest.approx(2 * 15 * bound)
    fits = [p["fits"] for p in report.to_json(plan, None)["programs"]]
    assert fits == [True, None, None]  # the memory of counted programs is unknown
    report.print_plan(plan, None, "")
    assert "bound by its arithmetic alone" in capsys.readouterr().out


def test_a_tpu_mesh_lowers_the_tpu_form_of_convolutions():
    """The form depends on the devices of the mesh, not on the default backend."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    from semiseg_jax import mesh as mesh_lib
    from semiseg_jax.models.convolutions import conv2d

    mesh = mesh_lib.make_mesh(chips.topology("v5e:2x2").devices)
    images = jax.ShapeDtypeStruct(
        (4, 9, 9, 8), jnp.bfloat16, sharding=mesh_lib.batch_sharding(mesh)
    )
    kernel = jax.ShapeDtypeStruct((3, 3, 1, 8), jnp.bfloat16, sharding=mesh_lib.replicated(mesh))
    gradients = jax.jit(jax.grad(lambda x, k: jnp.sum(conv2d(x, k, groups=8) ** 2), argnums=(0, 1)))
    assert gradients.lower(images, kernel).as_text().count("stablehlo.convolution") == 3


def test_more_chips_with_as_many_images_each_only_send_more():
    step = cost(flops=19.7e12, reduced=100 * GB)
    program = Program("student step", "tiny", 1.0, 16, (32, 40), step)
    load = Workload(5, 10, 20, 30, {(10, 10): 20}, {(10, 10): 30})
    plan = report.Plan(slice_of_four(), load, 1, 2**34, (program,), {}, ())
    bounds = plan.bounds_by_chips()
    assert bounds[4] == pytest.approx(2 * 3 / 4 * 100 / 200)
    assert bounds[256] == pytest.approx(2 * 255 / 256 * 100 / 200)
