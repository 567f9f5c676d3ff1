"""What the text of a compiled program says: its collectives, the types it convolves, its traffic.

The text is the optimised HLO that `jax.stages.Compiled.as_text` gives. Only what XLA prints on the
instruction's own line is read: result types with their layouts, the operation, its operands.
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
# Operations that touch no memory: names for parts of others, and the ends of those begun before.
_FREE = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id")
)
# Custom calls that only reserve memory.
_RESERVING = ("AllocateBuffer",)
# Spaces of memory on the chip: the vector memory, and the 128 MiB that a v4 shares (CMEM).
_ON_CHIP = ("S(1)", "S(3)")
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_TYPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")


@dataclasses.dataclass(frozen=True)
class Type:
    """A buffer's type.

    Attributes:
        dtype: as HLO names it, such as bf16.
        shape: of the array.
        order: axes from the one whose neighbours lie side by side to the outermost.
        tile: sides of the layout's first tile, of the innermost axes; () for none.
        on_chip: it lies in the memory on the chip, and not in the chip's main memory.
    """

    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    on_chip: bool = False

    @property
    def bytes(self) -> int:
        """What it takes in memory, tiles filled up."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            bits = int(re.sub(r"\D.*", "", self.dtype.lstrip("bfsuc")) or 8)
        sides = [self.shape[axis] for axis in self.order] if self.order else list(self.shape[::-1])
        for i, side in enumerate(self.tile[::-1][: len(sides)]):
            sides[i] = -(-sides[i] // side) * side
        return math.prod(sides) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program."""

    name: str
    opcode: str
    results: tuple[Type, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def scope(self) -> str:
        """Where in the source it comes from, as JAX names it; "" for what the compiler added."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def layer(self) -> str:
        """The part of the scope that names a layer, and whether it is of the backward pass."""
        names = [n for n in self.scope.split("/")[1:-1] if "(" not in n]
        backward = "transpose(" in self.scope
        return "/".join(names or ["outside of layers"]) + (", backward" if backward else "")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one instruction moves: bytes of its operands and results, all its runs together.

    Attributes:
        total: wherever they lie.
        main: of those in the chip's main memory.
    """

    instruction: Instruction
    total: int
    main: int


class Module:
    """A compiled program, by computation."""

    def __init__(self, text: str):
        self._computations: dict[str, list[Instruction]] = {}
        self._entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                current = self._computations[found[2]] = []
                if found[1]:
                    self._entry = found[2]
            elif found := _LINE.match(line):
                current.append(_instruction(found[1], found[2]))

    def collectives(self) -> dict[str, tuple[int, int]]:
        """Of each kind that occurs: (how many run, bytes of their operands), on one device."""
        totals: dict[str, tuple[int, int]] = {}
        for instruction, times, types in self._run(fused=True):
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                count, size = totals.get(kind, (0, 0))
                operands = sum(t.bytes for n in instruction.operands for t in types[n])
                totals[kind] = (count + times, size + times * operands)
        return totals

    def convolved(self) -> dict[tuple[str, ...], int]:
        """How many convolutions the program holds by the types of their operands.

        Matrix products are among them: the TPU's compiler writes those as convolutions.
        """
        totals: dict[tuple[str, ...], int] = {}
        for instruction, _, types in self._run(fused=True):
            if instruction.opcode in ("convolution", "dot"):
                key = tuple(types[n][0].dtype for n in instruction.operands)
                totals[key] = totals.get(key, 0) + 1
        return totals

    def custom_calls(self) -> int:
        """Bytes of operands and results of custom calls, which the compiler counts as none."""
        return sum(
            times * _moved(instruction, types)[0]
            for instruction, times, types in self._run()
            if instruction.opcode == "custom-call"
            and not any(f'"{target}"' in instruction.attributes for target in _RESERVING)
        )

    def traffic(self) -> list[Traffic]:
        """What each instruction moves, most first."""
        found = []
        for instruction, times, types in self._run():
            if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
                continue
            if instruction.opcode in ("while", "conditional", "call", "async-start"):
                continue  # What they run is counted itself.
            if any(f'"{target}"' in instruction.attributes for target in _RESERVING):
                continue
            total, main = _moved(instruction, types)
            found.append(Traffic(instruction, times * total, times * main))
        return sorted(found, key=lambda t: -t.total)

    def by_layer(self) -> dict[str, tuple[int, int]]:
        """(total, main) of `Traffic` summed by layer, most first; copies go by where they begin."""
        sums: dict[str, tuple[int, int]] = {}
        for moved in self.traffic():
            total, main = sums.get(moved.instruction.layer, (0, 0))
            sums[moved.instruction.layer] = (total + moved.total, main + moved.main)
        return dict(sorted(sums.items(), key=lambda item: -item[1][0]))

    def _run(
        self, fused: bool = False
    ) -> Iterator[tuple[Instruction, int, dict[str, tuple[Type, ...]]]]:
        """(instruction, how often it runs, types by name where it stands), from the entry on.

        Args:
            fused: also what is inside of fusions.
        """
        yield from self._run_of(self._entry, 1, fused)

    def _run_of(
        self, name: str, times: int, fused: bool
    ) -> Iterator[tuple[Instruction, int, dict[str, tuple[Type, ...]]]]:
        types = self._types(name)
        for instruction in self._computations[name]:
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
                yield from self._run_of(called, times * repeats, fused)

    @functools.cache  # noqa: B019 - lives as long as the module
    def _types(self, name: str) -> dict[str, tuple[Type, ...]]:
        return {i.name: i.results for i in self._computations[name]}


def _moved(instruction: Instruction, types: dict[str, tuple[Type, ...]]) -> tuple[int, int]:
    """Bytes of operands and results: (wherever they lie, in main memory)."""
    if instruction.opcode in ("slice", "slice-start"):
        # Of what is sliced the slice is read; what begins one names its source first.
        source, part = types[instruction.operands[0]][0], instruction.results[-1]
        if instruction.opcode == "slice-start":
            part = instruction.results[1]
        return 2 * part.bytes, part.bytes * ((not source.on_chip) + (not part.on_chip))
    buffers = [t for name in instruction.operands for t in types[name]]
    # What begins a copy names its source among its results.
    buffers += instruction.results[: 1 if instruction.opcode == "copy-start" else None]
    return sum(t.bytes for t in buffers), sum(t.bytes for t in buffers if not t.on_chip)


def _instruction(name: str, rest: str) -> Instruction:
    """The instruction behind `name = `."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    results, rest = _types_in(rest[:end]), rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    operands = rest[len(opcode) : end]
    # Constants hold numbers where others have operands.
    names = tuple(re.findall(r"%([\w.\-]+)", operands)) if opcode != "constant" else ()
    return Instruction(name, opcode, results, names, rest[end + 1 :])


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise ValueError(f"A parenthesis is not closed: {text[:200]}")


def _types_in(text: str) -> tuple[Type, ...]:
    return tuple(_type(found) for found in _TYPE.finditer(re.sub(r"/\*.*?\*/", "", text)))


def _type(found: re.Match[str]) -> Type:
    dtype, shape, order, layout = found.groups()
    tile = re.match(r"T\(([\d,]+)\)", layout or "")
    return Type(
        dtype,
        _integers(shape),
        _integers(order or ""),
        _integers(tile[1]) if tile else (),
        any(space in (layout or "") for space in _ON_CHIP),
    )


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _called(attributes: str, keys: str) -> list[str]:
    """Names of the computations that an attribute holds."""
    found = re.search(rf"(?:{keys})=(\{{[^}}]*\}}|%?[\w.\-]+)", attributes)
    return re.findall(r"[\w.\-]+", found[1].replace("%", "")) if found else []
