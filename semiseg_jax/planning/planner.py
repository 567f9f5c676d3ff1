"""Plans a config for topologies: compiles, tries what may make it fit, adds up the run."""

import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath

from semiseg_jax import mesh as mesh_lib
from semiseg_jax import state as state_lib
from semiseg_jax.data import pipeline, sources, streams
from semiseg_jax.data.labels import write_bytes
from semiseg_jax.models import deeplab
from semiseg_jax.planning import chips, forecast, programs, remedies, report, workload
from semiseg_jax.planning.chips import Topology
from semiseg_jax.planning.programs import Program
from semiseg_jax.planning.report import Plan
from semiseg_jax.planning.workload import Workload


def run(
    config: Any,
    names: Sequence[str],
    json_file: str | None = None,
    measure: float = 0.0,
    layers: int = 0,
    step_only: bool = False,
    machine_code: bool = False,
) -> None:
    """Prints the plan of each topology, and writes them as JSON where that is wanted.

    Args:
        config: the whole config.
        names: of the topologies.
        json_file: where to write, or None.
        measure: seconds to measure the input pipeline for; 0 for not at all.
        layers: how many layers of the student's step to list, by what they move.
        step_only, machine_code: see `make`.

    Raises:
        UserError: a topology does not exist or does not suit the batches, or there is nothing to
            know the data by.
    """
    # All of them first, so that a mistyped one does not wait for the others to compile.
    topologies = [chips.topology(name) for name in names]
    for topology in topologies:
        mesh_lib.check_batches(config, len(topology.devices))
    load = workload.of(config)
    supplied, why_not = _supplied(config, load, measure)
    plans = []
    for topology in topologies:
        plans.append(make(config, load, topology, print, step_only, machine_code))
        report.show(plans[-1], supplied, why_not, layers)
    if json_file:
        found = [report.as_json(plan, supplied) for plan in plans]
        write_bytes(epath.Path(json_file), (json.dumps(found, indent=1) + "\n").encode())


def make(
    config: Any,
    load: Workload,
    topology: Topology,
    say: Callable[[str], None],
    step_only: bool = False,
    machine_code: bool = False,
) -> Plan:
    """The plan of one topology.

    Args:
        config: the whole config.
        load: from `workload.of`.
        topology: from `chips.topology`.
        say: takes a line before each program that is compiled.
        step_only: compile the student's step alone, and count the arithmetic of the others.
        machine_code: compile to the end, which takes far longer for a TPU (see `drafts`).
    """
    limit = topology.chip.memory if topology.chip else _memory_here()
    found: list[Program] = []
    tried: dict[str, list[remedies.Remedy]] = {}
    how: programs.How = "compiled" if machine_code else "optimised"
    wanted = _wanted(config, load, topology, how)
    for kind, make_all in wanted[:1] if step_only else wanted:
        say(f"compiling for {topology.name}: {kind}")
        for program in make_all(config):
            found.append(program)
            if not remedies.fits(program.cost, limit):

                def again(changed: Any, scale: float = program.scale, all_=make_all) -> Program:
                    changed.pseudo.scales = changed.eval.scales = (scale,)
                    return next(iter(all_(changed)))

                say(f"compiling for {topology.name}: what would make {program.name} fit")
                tried[program.name] = remedies.tried(config, program.kind, again, topology, limit)
    if topology.chip and step_only:
        for kind, make_all in _wanted(config, load, topology, "counted")[1:]:
            say(f"counting for {topology.name}: {kind}")
            found += make_all(config)
    parts: list[forecast.Part] = []
    if topology.chip and not tried:
        parts = forecast.schedule(config, load, found, topology)
    return Plan(topology, load, _parameters(config, load), limit, tuple(found), tried, tuple(parts))


Maker = Callable[[Any], Any]


def _wanted(
    config: Any, load: Workload, topology: Topology, how: programs.How
) -> list[tuple[str, Maker]]:
    """(kind, a function that compiles its programs with a config) of all that a run needs.

    The student's step comes first.
    """

    def step(kind: str) -> tuple[str, Maker]:
        return f"{kind} step", lambda c: [programs.step(c, kind, load.classes, topology, how)]

    def inference(kind: str, backbone: str) -> tuple[str, Maker]:
        return kind, lambda c: programs.inference(c, kind, backbone, load, topology, how)

    first, later = (programs.backbone_of(config, kind) for kind in forecast.KINDS)
    wanted = [step("student")]
    if first != later:
        wanted.append(step("teacher"))
    rounds = config.rounds.count
    if rounds and forecast.takes_pseudo_labels(config) and load.unlabeled:
        # The last student labels nothing.
        labellers = dict.fromkeys([first, *([later] if rounds > 1 else [])])
        wanted += [inference("labelling", backbone) for backbone in labellers]
    if load.evaluated or load.selected:
        scored = dict.fromkeys([first, *([later] if rounds else [])])
        wanted += [inference("evaluation", backbone) for backbone in scored]
    return wanted


def _parameters(config: Any, load: Workload) -> int:
    """Of the student's network, with both norms."""
    backbone = programs.backbone_of(config, "student")
    model = deeplab.build(deeplab.config_for(config, backbone), load.classes)
    shapes = state_lib.variable_shapes(model)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _memory_here() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _supplied(config: Any, load: Workload, seconds: float) -> tuple[float | None, str]:
    """Images a second that the pipeline gives here, or None and why.

    Half of them are weakly, half strongly augmented. All are labelled images: pseudo-labels are
    not there yet, and cost as much to read.
    """
    if not seconds:
        return None, "--measure-input=10 measures what this machine's input supplies"
    if load.assumed:
        return None, "what the input supplies here cannot be measured without the data"
    dataset = sources.load(config)
    taken = streams.Streams(
        ("labeled",), ("labeled",), config.train.batch_labeled, config.train.batch_unlabeled
    )
    batches = pipeline.train_batches(
        config,
        dataset,
        (),
        taken,
        streams.stage_seed(config.seed, 1, "student"),
        range(1_000_000),
        deeplab.input_mean(config.model),
    )
    # What was made ahead while the first ones were waited for is not counted.
    for _ in range(2 * config.data.prefetch):
        next(batches)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        count += len(next(batches).ids)
    rate = count / (time.perf_counter() - began)
    batches.close()
    return rate, ""
