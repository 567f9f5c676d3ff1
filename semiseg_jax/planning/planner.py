"""Plans a config for topologies: compiles, suggests changes that fit, and adds up the run."""

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from etils import epath

from semiseg_jax import mesh as mesh_lib
from semiseg_jax import stages, train_state
from semiseg_jax.data import batch_layout, input_pipeline
from semiseg_jax.data import load as load_lib
from semiseg_jax.models import deeplab
from semiseg_jax.planning import chips, forecast, programs, report, workload
from semiseg_jax.planning import suggestions as suggestions_lib
from semiseg_jax.planning.chips import Topology
from semiseg_jax.planning.programs import CompileLevel, Program
from semiseg_jax.planning.report import Plan
from semiseg_jax.planning.workload import Workload
from semiseg_jax.runtime.fileio import write_bytes
from semiseg_jax.runtime.logger import logger


def run(
    config: Any,
    names: Sequence[str],
    json_file: str | None = None,
    measure: float = 0.0,
    num_layers: int = 0,
    step_only: bool = False,
    machine_code: bool = False,
) -> None:
    """Prints the plan of each topology and optionally writes all plans as JSON.

    Args:
        config: the whole config.
        names: names of the topologies.
        json_file: JSON file to write, or None.
        measure: seconds to measure the input pipeline for; 0 skips the measurement.
        num_layers: number of layers of the student's step to list, by their traffic.
        step_only, machine_code: see `make_plan`.

    Raises:
        UserError: a topology does not exist, its devices do not divide the batches, or the sizes of
            the data are unknown.
    """
    # Check every name first: a mistyped one fails before the others are compiled.
    topologies = [chips.topology(name) for name in names]
    for topology in topologies:
        mesh_lib.check_batches(config, len(topology.devices))
    config = workload.resolve_sizes(config)
    load = workload.from_config(config)
    input_rate, input_note = _measure_input_rate(config, load, measure)
    plans = []
    for topology in topologies:
        plans.append(make_plan(config, load, topology, step_only, machine_code))
        report.print_plan(plans[-1], input_rate, input_note, num_layers)
    if json_file:
        content = [report.to_json(plan, input_rate) for plan in plans]
        write_bytes(epath.Path(json_file), (json.dumps(content, indent=1) + "\n").encode())


def make_plan(
    config: Any,
    load: Workload,
    topology: Topology,
    step_only: bool = False,
    machine_code: bool = False,
) -> Plan:
    """Makes the plan of one topology; logs a line before each compilation.

    Args:
        config: the whole config.
        load: from `workload.from_config`.
        topology: from `chips.topology`.
        step_only: compile only the student's step, and count the arithmetic of other programs.
        machine_code: compile to machine code, which takes far longer for a TPU (see
            `optimized_hlo`).
    """
    limit = topology.chip.memory if topology.chip else _physical_memory()
    compiled: list[Program] = []
    suggestions: dict[str, list[suggestions_lib.Suggestion]] = {}
    level: CompileLevel = "compiled" if machine_code else "optimised"
    compilers = _program_compilers(config, load, topology, level)
    for kind, compile_all in compilers[:1] if step_only else compilers:
        logger.info(f"compiling for {topology.name}: {kind}")
        for program in compile_all(config):
            compiled.append(program)
            if not suggestions_lib.fits(program.cost, limit):

                def recompile(
                    changed: Any, scale: float = program.scale, compile_all=compile_all
                ) -> Program:
                    changed.pseudo.scales = changed.eval.scales = (scale,)
                    return next(iter(compile_all(changed)))

                logger.info(f"compiling for {topology.name}: what would make {program.name} fit")
                suggestions[program.name] = suggestions_lib.try_changes(
                    config, program.kind, recompile, topology, limit
                )
    if topology.chip and step_only:
        for kind, count_all in _program_compilers(config, load, topology, "counted")[1:]:
            logger.info(f"counting for {topology.name}: {kind}")
            compiled += count_all(config)
    schedule: list[forecast.WorkItem] = []
    if topology.chip and not suggestions:
        schedule = forecast.schedule(config, load, compiled, topology)
    return Plan(
        topology,
        load,
        _num_parameters(config, load),
        limit,
        tuple(compiled),
        suggestions,
        tuple(schedule),
    )


CompileAll = Callable[[Any], Iterable[Program]]


def _program_compilers(
    config: Any, load: Workload, topology: Topology, level: CompileLevel
) -> list[tuple[str, CompileAll]]:
    """Returns (kind, function that compiles its programs for a config) for all that a run needs.

    The student's step is the first.
    """

    def step(kind: str) -> tuple[str, CompileAll]:
        return f"{kind} step", lambda c: [
            programs.step_program(c, kind, load.classes, topology, level)
        ]

    def inference(kind: str, backbone: str) -> tuple[str, CompileAll]:
        return kind, lambda c: programs.inference_programs(c, kind, backbone, load, topology, level)

    teacher_backbone = stages.stage_backbone(config, "teacher")
    student_backbone = stages.stage_backbone(config, "student")
    compilers = [step("student")]
    if teacher_backbone != student_backbone:
        compilers.append(step("teacher"))
    num_rounds = config.rounds.count
    if stages.takes_pseudo_labels(config) and load.unlabeled:
        # The last student labels nothing.
        labelers = [teacher_backbone, *([student_backbone] if num_rounds > 1 else [])]
        compilers += [inference("labelling", name) for name in dict.fromkeys(labelers)]
    if load.evaluated or load.selected:
        evaluated = [teacher_backbone, *([student_backbone] if num_rounds else [])]
        compilers += [inference("evaluation", name) for name in dict.fromkeys(evaluated)]
    return compilers


def _num_parameters(config: Any, load: Workload) -> int:
    """Returns the number of parameters of the student's network, including both norms."""
    backbone = stages.stage_backbone(config, "student")
    model = deeplab.build(deeplab.config_for(config, backbone), load.classes)
    shapes = train_state.variable_shapes(model)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _physical_memory() -> int:
    """Returns the memory of this machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _measure_input_rate(config: Any, load: Workload, seconds: float) -> tuple[float | None, str]:
    """Measures the images per second of this machine's input pipeline.

    Half of the images are weakly, half strongly augmented. All are labelled images: pseudo-labels
    do not exist yet, and cost as much to read.

    Returns:
        (rate, ""), or (None, the reason why nothing was measured).
    """
    if not seconds:
        return None, "--measure-input=10 measures what this machine's input supplies"
    if load.assumptions:
        return None, "what the input supplies here cannot be measured without the data"
    dataset = load_lib.load_dataset(config)
    batch_spec = batch_layout.BatchSpec(
        ("labeled",), ("labeled",), config.train.batch_labeled, config.train.batch_unlabeled
    )
    batches = input_pipeline.train_batches(
        config,
        dataset,
        (),
        batch_spec,
        stages.stage_seed(config.seed, 1, "student"),
        range(1_000_000),
        deeplab.input_mean(config.model),
    )
    # Skip the batches that were prefetched while waiting for the first ones.
    for _ in range(2 * config.data.prefetch):
        next(batches)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        count += len(next(batches).ids)
    rate = count / (time.perf_counter() - began)
    batches.close()
    return rate, ""
