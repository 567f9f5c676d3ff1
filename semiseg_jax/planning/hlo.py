"""Parses the text of a compiled program: collectives, convolution dtypes and memory traffic.

The text is the optimized HLO from `jax.stages.Compiled.as_text`. Only the line of each instruction
is parsed: result types with their layouts, the opcode and the operands.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Opcodes that touch no memory because they only name or group other values.
_FREE = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id")
)
# Opcodes whose traffic is counted at the instructions of the computations that they call.
_CALLERS = frozenset(("while", "conditional", "call", "async-start"))
# Custom calls that only reserve memory.
_RESERVING = ("AllocateBuffer",)
# Memory spaces on the chip: the vector memory, and the 128 MiB that a v4 shares (CMEM).
_ON_CHIP = ("S(1)", "S(3)")
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_TYPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")


@dataclasses.dataclass(frozen=True)
class Type:
    """The type of a buffer.

    Attributes:
        dtype: HLO name of the element type, such as bf16.
        shape: shape of the array.
        order: axes from the innermost (contiguous) to the outermost.
        tile: sides of the layout's first tile, over the innermost axes; () without tiling.
        on_chip: whether the buffer is in on-chip memory instead of the main memory.
    """

    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    on_chip: bool = False

    @property
    def bytes(self) -> int:
        """Size in memory in bytes, with padded tiles."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            bits = int(re.sub(r"\D.*", "", self.dtype.lstrip("bfsuc")) or 8)
        sides = [self.shape[axis] for axis in self.order] if self.order else list(self.shape[::-1])
        for i, side in enumerate(self.tile[::-1][: len(sides)]):
            sides[i] = -(-sides[i] // side) * side
        return math.prod(sides) * bits // 8


TypesByName = dict[str, tuple[Type, ...]]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a program."""

    name: str
    opcode: str
    results: tuple[Type, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def scope(self) -> str:
        """JAX's name stack of the source operation; "" for instructions that XLA inserted."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def layer(self) -> str:
        """The layer in the scope, followed by ", backward" in the backward pass."""
        names = [n for n in self.scope.split("/")[1:-1] if "(" not in n]
        backward = "transpose(" in self.scope
        return "/".join(names or ["outside of layers"]) + (", backward" if backward else "")

    @property
    def reserves_memory(self) -> bool:
        """Whether this is a custom call that only allocates a buffer."""
        return any(f'"{target}"' in self.attributes for target in _RESERVING)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of the operands and results of one instruction, summed over all its executions.

    Attributes:
        instruction: the instruction.
        total: bytes in any memory.
        main_memory: bytes in the chip's main memory.
    """

    instruction: Instruction
    total: int
    main_memory: int


class Module:
    """A compiled program, parsed into computations."""

    def __init__(self, text: str):
        self._computations: dict[str, list[Instruction]] = {}
        self._entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                current = self._computations[match[2]] = []
                if match[1]:
                    self._entry = match[2]
            elif match := _LINE.match(line):
                current.append(_parse_instruction(match[1], match[2]))

    def collectives(self) -> dict[str, tuple[int, int]]:
        """Returns (number of executions, bytes of operands) on one device by kind of collective."""
        totals: dict[str, tuple[int, int]] = {}
        for instruction, times, types in self._executed(fused=True):
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                count, size = totals.get(kind, (0, 0))
                operands = sum(t.bytes for n in instruction.operands for t in types[n])
                totals[kind] = (count + times, size + times * operands)
        return totals

    def convolution_dtypes(self) -> dict[tuple[str, ...], int]:
        """Returns the number of convolutions by the dtypes of their operands.

        Matrix products are included: the TPU compiler writes them as convolutions.
        """
        totals: dict[tuple[str, ...], int] = {}
        for instruction, _, types in self._executed(fused=True):
            if instruction.opcode in ("convolution", "dot"):
                key = tuple(types[n][0].dtype for n in instruction.operands)
                totals[key] = totals.get(key, 0) + 1
        return totals

    def custom_call_bytes(self) -> int:
        """Returns bytes of operands and results of custom calls; XLA's cost analysis omits them."""
        return sum(
            times * _operand_bytes(instruction, types)[0]
            for instruction, times, types in self._executed()
            if instruction.opcode == "custom-call" and not instruction.reserves_memory
        )

    def traffic(self) -> list[Traffic]:
        """Returns the traffic of each instruction, the largest first."""
        result = []
        for instruction, times, types in self._executed():
            if instruction.opcode in _FREE | _CALLERS or instruction.opcode.endswith("-done"):
                continue
            if instruction.reserves_memory:
                continue
            total, main_memory = _operand_bytes(instruction, types)
            result.append(Traffic(instruction, times * total, times * main_memory))
        return sorted(result, key=lambda t: -t.total)

    def traffic_by_layer(self) -> dict[str, tuple[int, int]]:
        """Returns (total, main memory) bytes by layer, the largest first.

        An asynchronous copy belongs to the layer of its start instruction.
        """
        sums: dict[str, tuple[int, int]] = {}
        for item in self.traffic():
            total, main_memory = sums.get(item.instruction.layer, (0, 0))
            sums[item.instruction.layer] = (total + item.total, main_memory + item.main_memory)
        return dict(sorted(sums.items(), key=lambda item: -item[1][0]))

    def _executed(self, fused: bool = False) -> Iterator[tuple[Instruction, int, TypesByName]]:
        """Yields (instruction, number of executions, types by name in its computation).

        Args:
            fused: whether to include the instructions inside fusions.
        """
        yield from self._executed_in(self._entry, 1, fused)

    def _executed_in(
        self, computation: str, times: int, fused: bool
    ) -> Iterator[tuple[Instruction, int, TypesByName]]:
        types = self._types(computation)
        for instruction in self._computations[computation]:
            yield instruction, times, types
            opcode, attributes = instruction.opcode, instruction.attributes
            if opcode == "while":
                count = re.search(r'"known_trip_count":\{"n":"(\d+)"', attributes)
                inner, repeats = _called(attributes, "body"), int(count[1]) if count else 1
            elif opcode in ("call", "async-start") or (fused and opcode == "fusion"):
                inner, repeats = _called(attributes, "calls|to_apply|called_computations"), 1
            elif opcode == "conditional":
                inner, repeats = _called(attributes, "branch_computations"), 1
            else:
                continue
            for called in inner:
                yield from self._executed_in(called, times * repeats, fused)

    @functools.cache  # noqa: B019 - lives as long as the module
    def _types(self, computation: str) -> TypesByName:
        return {i.name: i.results for i in self._computations[computation]}


def _operand_bytes(instruction: Instruction, types: TypesByName) -> tuple[int, int]:
    """Returns the bytes of operands and results: (in any memory, in main memory)."""
    if instruction.opcode in ("slice", "slice-start"):
        # A slice reads only as much as it returns. The results of a slice-start are its source, the
        # slice and a context.
        source, sliced = types[instruction.operands[0]][0], instruction.results[-1]
        if instruction.opcode == "slice-start":
            sliced = instruction.results[1]
        return 2 * sliced.bytes, sliced.bytes * ((not source.on_chip) + (not sliced.on_chip))
    buffers = [t for name in instruction.operands for t in types[name]]
    # The results of a copy-start include its source.
    buffers += instruction.results[: 1 if instruction.opcode == "copy-start" else None]
    return sum(t.bytes for t in buffers), sum(t.bytes for t in buffers if not t.on_chip)


def _parse_instruction(name: str, definition: str) -> Instruction:
    """Parses the text after `name = `."""
    end = _closing(definition, 0) + 1 if definition.startswith("(") else definition.index(" ")
    results, rest = _parse_types(definition[:end]), definition[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    operands = rest[len(opcode) : end]
    # The parentheses of a constant contain its value instead of operands.
    names = tuple(re.findall(r"%([\w.\-]+)", operands)) if opcode != "constant" else ()
    return Instruction(name, opcode, results, names, rest[end + 1 :])


def _closing(text: str, start: int) -> int:
    """Returns the index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise ValueError(f"A parenthesis is not closed: {text[:200]}")


def _parse_types(text: str) -> tuple[Type, ...]:
    return tuple(_parse_type(match) for match in _TYPE.finditer(re.sub(r"/\*.*?\*/", "", text)))


def _parse_type(match: re.Match[str]) -> Type:
    dtype, shape, order, layout = match.groups()
    tile = re.match(r"T\(([\d,]+)\)", layout or "")
    return Type(
        dtype,
        _parse_integers(shape),
        _parse_integers(order or ""),
        _parse_integers(tile[1]) if tile else (),
        any(space in (layout or "") for space in _ON_CHIP),
    )


def _parse_integers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _called(attributes: str, keys: str) -> list[str]:
    """Returns the names of the computations in an attribute; `keys` is a regular expression."""
    match = re.search(rf"(?:{keys})=(\{{[^}}]*\}}|%?[\w.\-]+)", attributes)
    return re.findall(r"[\w.\-]+", match[1].replace("%", "")) if match else []
