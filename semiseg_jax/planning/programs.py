"""Compiles the programs of a run for devices that need not exist, and measures what they need.

Nothing is executed: programs are traced from shapes. The numbers are properties of the program that
the compiler produced for the target devices, independent of this machine's devices.
"""

import dataclasses
import functools
import re
import time
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from semiseg_jax import compiled_model, stages, train, train_state
from semiseg_jax import mesh as mesh_lib
from semiseg_jax.inference import Predictor
from semiseg_jax.losses import supervised_loss
from semiseg_jax.models import deeplab
from semiseg_jax.planning import flops, hlo, optimized_hlo
from semiseg_jax.planning.chips import Topology
from semiseg_jax.planning.workload import Size, Workload

# How far a program is compiled: not at all, up to its optimized HLO, or to machine code.
CompileLevel = Literal["counted", "optimised", "compiled"]
_NUMBER = r"([\d.]+)([KMGT]?)"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Main memory that a program needs on one chip, in bytes.

    Attributes:
        total: peak of the whole program.
        arguments: share of the inputs: the state and the batch.
        temporaries: share of the values that live only during the program.
    """

    total: int
    arguments: int
    temporaries: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """Resources that a program needs on one chip.

    Attributes:
        memory: main memory.
        flops: operations of convolutions and matrix products, counted from the traced program.
        compiler_flops: all operations by the compiler's count; None without machine code.
        traffic: bytes that operations read and write by the compiler's count, plus those of custom
            calls; None without machine code.
        main_traffic: bytes to and from the main memory, from the layouts in the program; None on
            the CPU, whose layouts do not name a memory space.
        custom_calls: bytes that custom calls read and write.
        collectives: (number of executions, bytes of operands) by kind.
        convolved: number of convolutions and matrix products by the dtypes of their operands.
        by_layer: (bytes of operands and results, of these in main memory) by layer, largest first.
        seconds: duration of the compilation.
    """

    memory: Memory
    flops: float
    compiler_flops: float | None
    traffic: float | None
    main_traffic: float | None
    custom_calls: int
    collectives: dict[str, tuple[int, int]]
    convolved: dict[str, int]
    by_layer: dict[str, tuple[int, int]]
    seconds: float

    @property
    def total_traffic(self) -> int:
        """Bytes of operands and results of all operations, in any memory."""
        return sum(total for total, _ in self.by_layer.values())


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """A program that does not fit into the memory of the device.

    Attributes:
        needed: bytes of main memory on one chip, at least those of temporaries; 0 if the compiler's
            message has no number.
        limit: available bytes; 0 if the compiler's message has no number.
    """

    needed: int
    limit: int


@dataclasses.dataclass(frozen=True)
class Counted:
    """A program that was traced but not compiled.

    Attributes:
        flops: as in `Cost`.
    """

    flops: float


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a run.

    Attributes:
        kind: "student step", "teacher step", "labelling" or "evaluation".
        backbone: backbone of its network.
        scale: scale of the images; 1 for steps.
        images: number of images per call, over all devices.
        size: (height, width) of the images, in pixels.
        cost: its cost, as far as the program fits and was compiled.
    """

    kind: str
    backbone: str
    scale: float
    images: int
    size: Size
    cost: Cost | TooLarge | Counted

    @property
    def name(self) -> str:
        """Display name, such as "labelling at 0.75"."""
        return self.kind if self.kind.endswith("step") else f"{self.kind} at {self.scale:g}"


def step_program(
    config: Any, kind: str, num_classes: int, topology: Topology, level: CompileLevel = "compiled"
) -> Program:
    """Compiles the training step of a kind of stage.

    Args:
        config: the whole config.
        kind: "teacher" or "student".
        num_classes: number of classes.
        topology: devices to compile for.
        level: see `program_cost`.
    """
    batch_spec = stages.batch_spec(config, kind)
    num_images = batch_spec.num_images
    trace = functools.partial(_trace_step, _picklable(config), kind, num_classes)
    cost = program_cost(trace, topology, level)
    backbone, size = stages.stage_backbone(config, kind), tuple(config.data.crop)
    return Program(f"{kind} step", backbone, 1.0, num_images, size, cost)


def _picklable(config: Any) -> Any:
    """Returns a copy of the config without references, which contain functions."""
    return config.copy_and_resolve_references()


def _trace_step(config: Any, kind: str, num_classes: int, topology: Topology) -> jax.stages.Traced:
    mesh = mesh_lib.make_mesh(topology.devices)
    # No cost depends on the values of class weights.
    names = [str(i) for i in range(num_classes)]
    config = supervised_loss.resolve(config, np.ones(num_classes, np.int64), names)
    model = deeplab.build(
        deeplab.config_for(config, stages.stage_backbone(config, kind)), num_classes
    )
    program = compiled_model.make_program(config, kind, config.train.steps, model, mesh)
    return train.trace_step(program, tuple(config.data.crop), mesh)


def inference_programs(
    config: Any,
    kind: str,
    backbone: str,
    load: Workload,
    topology: Topology,
    level: CompileLevel = "compiled",
) -> Iterator[Program]:
    """Compiles labelling or evaluation, one program per scale, for the largest images of the set.

    Args:
        config: the whole config.
        kind: "labelling" or "evaluation".
        backbone: backbone of the network.
        load: sizes of the images.
        topology: devices to compile for.
        level: see `program_cost`.
    """
    settings = config.pseudo if kind == "labelling" else config.eval
    size = largest_size(inference_sizes(load, kind))
    plain_config = _picklable(config)
    for scale in settings.scales:
        trace = functools.partial(
            _trace_scale, plain_config, kind, backbone, load.classes, size, scale
        )
        cost = program_cost(trace, topology, level)
        num_images = mesh_lib.round_up_batch(settings.batch, len(topology.devices))
        yield Program(kind, backbone, scale, num_images, size, cost)


def _trace_scale(
    config: Any,
    kind: str,
    backbone: str,
    num_classes: int,
    size: Size,
    scale: float,
    topology: Topology,
) -> jax.stages.Traced:
    settings = config.pseudo if kind == "labelling" else config.eval
    mesh = mesh_lib.make_mesh(topology.devices)
    replicated, by_image = mesh_lib.replicated(mesh), mesh_lib.batch_sharding(mesh)
    model = deeplab.build(deeplab.config_for(config, backbone), num_classes)
    predictor = Predictor(
        model,
        mesh,
        settings.scales,
        settings.flip,
        config.pseudo.average if kind == "labelling" else "softmax",
        settings.window,
        settings.window_stride,
    )
    variables = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        train_state.inference_variables(train_state.variable_shapes(model)),
    )
    batch = mesh_lib.round_up_batch(settings.batch, mesh.size)
    images = jax.ShapeDtypeStruct((batch, *size, 3), jnp.uint8, sharding=by_image)
    total = jax.ShapeDtypeStruct((batch, *size, num_classes), jnp.float32, sharding=by_image)
    return predictor.add_scale.trace(total, variables, images, scale)


def inference_sizes(load: Workload, kind: str) -> dict[Size, int]:
    """Returns the sizes of the images of "labelling" or "evaluation".

    Selection of weights uses the same programs as the reported evaluation.
    """
    return load.label_sizes if kind == "labelling" else load.evaluation_sizes | load.selection_sizes


def largest_size(sizes: dict[Size, int]) -> Size:
    """Returns the size with the most pixels."""
    return max(sizes, key=lambda size: size[0] * size[1])


@dataclasses.dataclass(frozen=True)
class _CompilerOutput:
    """Text and memory of a program, and the compiler's counts if it produced machine code."""

    text: str
    memory: Memory
    flops: float | None = None
    bytes_accessed: float | None = None


def program_cost(
    trace: optimized_hlo.Trace, topology: Topology, level: CompileLevel
) -> Cost | TooLarge | Counted:
    """Returns the cost of a program.

    Args:
        trace: traces the program for a topology.
        topology: devices to compile for.
        level: "counted" compiles nothing. "optimised" stops the TPU compiler before machine code
            (see `optimized_hlo`): the memory excludes code, and the compiler's counts are unknown.
            "compiled" compiles to machine code. The CPU treats "optimised" as "compiled".
    """
    began = time.perf_counter()
    traced = trace(topology)
    # Each image is processed by one device.
    flops_per_device = flops.count(traced.jaxpr) / len(topology.devices)
    if level == "counted":
        return Counted(flops_per_device)
    if topology.chip and level == "optimised":
        output = _compile_to_hlo(trace, traced.fun_name, topology)
    else:
        output = _compile(traced)
    if isinstance(output, TooLarge):
        return output
    module = hlo.Module(output.text)
    custom_calls = module.custom_call_bytes()
    dtypes = module.convolution_dtypes()
    traffic = None if output.bytes_accessed is None else output.bytes_accessed + custom_calls
    return Cost(
        memory=output.memory,
        flops=flops_per_device,
        compiler_flops=output.flops,
        traffic=traffic,
        main_traffic=sum(t.main_memory for t in module.traffic()) if topology.chip else None,
        custom_calls=custom_calls,
        collectives=module.collectives(),
        convolved={" × ".join(operands): count for operands, count in dtypes.items()},
        by_layer=module.traffic_by_layer(),
        seconds=time.perf_counter() - began,
    )


def _compile(traced: jax.stages.Traced) -> _CompilerOutput | TooLarge:
    compiled: Any = mesh_lib.try_compile(traced)
    if isinstance(compiled, str):
        return parse_out_of_memory(compiled)
    counts, analysis = compiled.cost_analysis(), compiled.memory_analysis()
    # Results that are not aliased to an argument need memory of their own.
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    total = arguments + temporaries + results + analysis.generated_code_size_in_bytes
    memory = Memory(total, arguments, temporaries)
    return _CompilerOutput(compiled.as_text(), memory, counts["flops"], counts["bytes accessed"])


def _compile_to_hlo(
    trace: optimized_hlo.Trace, name: str, topology: Topology
) -> _CompilerOutput | TooLarge:
    optimized = optimized_hlo.optimized_hlo(trace, topology, name)
    if isinstance(optimized, str):
        return parse_out_of_memory(optimized)
    return _CompilerOutput(optimized.text, Memory(*optimized.memory()))


def parse_out_of_memory(message: str) -> TooLarge:
    """Parses the TPU compiler's message about a program that does not fit; it has two forms."""
    match = re.search(
        rf"Used {_NUMBER} of {_NUMBER}|temporaries \({_NUMBER}\) exceeds [^(]*\({_NUMBER}\)",
        message,
    )
    if not match:
        return TooLarge(0, 0)
    used, unit, limit, limit_unit = (text for text in match.groups() if text is not None)
    return TooLarge(round(float(used) * _UNITS[unit]), round(float(limit) * _UNITS[limit_unit]))
