"""The programs of a run, compiled for devices that need not be there, and what each of them needs.

Nothing is computed: programs are traced from shapes. What is counted is what the compiler made of
them for the devices, whatever this machine's are.
"""

import dataclasses
import functools
import re
import time
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from semiseg_jax import mesh as mesh_lib
from semiseg_jax import optim, steps, train
from semiseg_jax import state as state_lib
from semiseg_jax.data import streams
from semiseg_jax.inference import Predictor
from semiseg_jax.models import deeplab
from semiseg_jax.planning import drafts, flops, hlo
from semiseg_jax.planning.chips import Topology
from semiseg_jax.planning.workload import Size, Workload

_NUMBER = r"([\d.]+)([KMGT]?)"
How = Literal["counted", "optimised", "compiled"]
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of main memory that a program needs on one chip.

    Attributes:
        total: at the same time.
        arguments: of it what goes in and stays: the state and the batch.
        temporaries: of it what lives while the program runs.
    """

    total: int
    arguments: int
    temporaries: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a program needs on one chip.

    Attributes:
        memory: of it.
        flops: operations of convolutions and matrix products, counted from the program.
        compiler_flops: all operations, by the compiler's own count; None without machine code.
        traffic: bytes that operations read and write, by the compiler's count, and those of
            custom calls; None likewise.
        main_traffic: what goes to and from the main memory, by the layouts in the program;
            None on the CPU, whose layouts do not say.
        custom_calls: what custom calls read and write.
        collectives: by kind: (how many, bytes of their operands).
        convolved: how many convolutions and matrix products by the types of their operands.
        by_layer: by layer: (bytes of operands and results, of them in main memory), most first.
        seconds: that compiling took.
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
    def moved(self) -> int:
        """Bytes of operands and results of all operations, wherever they lie."""
        return sum(total for total, _ in self.by_layer.values())


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """A program that the compiler could not place.

    Attributes:
        needed: bytes of one chip's main memory, those of temporaries at least; 0 where the
            compiler did not say.
        limit: bytes that there are, likewise.
    """

    needed: int
    limit: int


@dataclasses.dataclass(frozen=True)
class Counted:
    """A program that was not compiled.

    Attributes:
        flops: as of `Cost`.
    """

    flops: float


@dataclasses.dataclass(frozen=True)
class Program:
    """One of a run's programs.

    Attributes:
        kind: "student step", "teacher step", "labelling" or "evaluation".
        backbone: of its network.
        scale: of the images; 1 for steps.
        images: that a run of it takes, over all devices.
        size: (height, width) of those in pixels.
        cost: or that it does not fit, or what was counted where nothing was compiled.
    """

    kind: str
    backbone: str
    scale: float
    images: int
    size: Size
    cost: Cost | TooLarge | Counted

    @property
    def name(self) -> str:
        """For people: "labelling at 0.75"."""
        return self.kind if self.kind.endswith("step") else f"{self.kind} at {self.scale:g}"


def step(
    config: Any, kind: str, classes: int, topology: Topology, how: How = "compiled"
) -> Program:
    """The training step of a kind of stage.

    Args:
        config: the whole config.
        kind: "teacher" or "student".
        classes: how many.
        topology: to compile for.
        how: see `cost_of`.
    """
    taken = streams.of_stage(config, kind)
    images = taken.size("weak") + taken.size("strong")
    trace = functools.partial(_trace_step, _plain(config), kind, classes)
    cost = cost_of(trace, topology, how)
    backbone, size = backbone_of(config, kind), tuple(config.data.crop)
    return Program(f"{kind} step", backbone, 1.0, images, size, cost)


def _plain(config: Any) -> Any:
    """A config that can be pickled: its references hold functions."""
    return config.copy_and_resolve_references()


def _trace_step(config: Any, kind: str, classes: int, topology: Topology) -> jax.stages.Traced:
    mesh = mesh_lib.make_mesh(topology.devices)
    model = deeplab.build(deeplab.config_for(config, backbone_of(config, kind)), classes)
    tx, schedule = optim.make_optimizer(config.optim, kind, config.train.steps)
    taken = streams.of_stage(config, kind)
    made: Any = steps.make_train_step(model, tx, config.loss, taken, mesh)
    program = train.Program(made, tx, schedule, taken, state_lib.variable_shapes(model))
    return train.traced(program, tuple(config.data.crop), mesh)


def inference(
    config: Any,
    kind: str,
    backbone: str,
    load: Workload,
    topology: Topology,
    how: How = "compiled",
) -> Iterator[Program]:
    """The programs of labelling or evaluation, one a scale, on the largest images of the set.

    Args:
        config: the whole config.
        kind: "labelling" or "evaluation".
        backbone: of the network.
        load: for the sizes.
        topology: to compile for.
        how: see `cost_of`.
    """
    protocol = config.pseudo if kind == "labelling" else config.eval
    # What weights are chosen by is evaluated with the programs of what is reported.
    evaluated = load.evaluation_sizes | load.selection_sizes
    size = largest(load.label_sizes if kind == "labelling" else evaluated)
    plain = _plain(config)
    for scale in protocol.scales:
        trace = functools.partial(_trace_scale, plain, kind, backbone, load.classes, size, scale)
        cost = cost_of(trace, topology, how)
        images = mesh_lib.batch_over(protocol.batch, len(topology.devices))
        yield Program(kind, backbone, scale, images, size, cost)


def _trace_scale(
    config: Any,
    kind: str,
    backbone: str,
    classes: int,
    size: Size,
    scale: float,
    topology: Topology,
) -> jax.stages.Traced:
    protocol = config.pseudo if kind == "labelling" else config.eval
    mesh = mesh_lib.make_mesh(topology.devices)
    whole, split = mesh_lib.replicated(mesh), mesh_lib.split_by_image(mesh)
    model = deeplab.build(deeplab.config_for(config, backbone), classes)
    predictor = Predictor(
        model,
        mesh,
        protocol.scales,
        protocol.flip,
        config.pseudo.average if kind == "labelling" else "softmax",
        protocol.window,
        protocol.window_stride,
    )
    variables = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        state_lib.for_inference(state_lib.variable_shapes(model)),
    )
    batch = mesh_lib.batch_over(protocol.batch, mesh.size)
    images = jax.ShapeDtypeStruct((batch, *size, 3), jnp.uint8, sharding=split)
    total = jax.ShapeDtypeStruct((batch, *size, classes), jnp.float32, sharding=split)
    return predictor.add_scale.trace(total, variables, images, scale)


def backbone_of(config: Any, kind: str) -> str:
    """The backbone of a kind of stage."""
    student = config.rounds.student_model if kind == "student" else ""
    return student or config.model.backbone


def largest(sizes: dict[Size, int]) -> Size:
    """The size with the most pixels."""
    return max(sizes, key=lambda size: size[0] * size[1])


@dataclasses.dataclass(frozen=True)
class _Read:
    """What was read of a program; the compiler's counts where it made machine code of it."""

    text: str
    memory: Memory
    flops: float | None = None
    bytes_accessed: float | None = None


def cost_of(trace: drafts.Trace, topology: Topology, how: How) -> Cost | TooLarge | Counted:
    """What a program needs.

    Args:
        trace: traces it.
        topology: to compile for.
        how: "counted" compiles nothing; "optimised" reads what a TPU's compiler has before machine
            code (`drafts`), so that memory is without code, and nothing is known of the compiler's
            counts; "compiled" goes to the end, as it always does for the CPU.
    """
    began = time.perf_counter()
    traced = trace(topology)
    # Every image's work is on one device.
    counted = flops.count(traced.jaxpr) / len(topology.devices)
    if how == "counted":
        return Counted(counted)
    draft = topology.chip and how == "optimised"
    read = _drafted(trace, traced.fun_name, topology) if draft else _compiled(traced)
    if isinstance(read, TooLarge):
        return read
    module = hlo.Module(read.text)
    custom_calls = module.custom_calls()
    return Cost(
        memory=read.memory,
        flops=counted,
        compiler_flops=read.flops,
        traffic=None if read.bytes_accessed is None else read.bytes_accessed + custom_calls,
        main_traffic=sum(t.main for t in module.traffic()) if topology.chip else None,
        custom_calls=custom_calls,
        collectives=module.collectives(),
        convolved={" × ".join(types): count for types, count in module.convolved().items()},
        by_layer=module.by_layer(),
        seconds=time.perf_counter() - began,
    )


def _compiled(traced: jax.stages.Traced) -> _Read | TooLarge:
    compiled: Any = mesh_lib.compiled(traced)
    if isinstance(compiled, str):
        return too_large(compiled)
    counts, memory = compiled.cost_analysis(), _memory(compiled.memory_analysis())
    return _Read(compiled.as_text(), memory, counts["flops"], counts["bytes accessed"])


def _drafted(trace: drafts.Trace, name: str, topology: Topology) -> _Read | TooLarge:
    draft = drafts.draft(trace, topology, name)
    if isinstance(draft, str):
        return too_large(draft)
    return _Read(draft.program, Memory(*draft.memory()))


def _memory(analysis: Any) -> Memory:
    kept = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    total = arguments + temporaries + kept + analysis.generated_code_size_in_bytes
    return Memory(total, arguments, temporaries)


def too_large(message: str) -> TooLarge:
    """What the TPU's compiler says of a program that does not fit, in one of its two sentences."""
    found = re.search(
        rf"Used {_NUMBER} of {_NUMBER}|temporaries \({_NUMBER}\) exceeds [^(]*\({_NUMBER}\)",
        message,
    )
    if not found:
        return TooLarge(0, 0)
    used, unit, limit, unit_of_limit = (text for text in found.groups() if text is not None)
    return TooLarge(round(float(used) * _UNITS[unit]), round(float(limit) * _UNITS[unit_of_limit]))
