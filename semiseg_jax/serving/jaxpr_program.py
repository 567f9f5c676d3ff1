"""Rebuilds a traced JAX program from the operations of another framework.

The converters to ONNX and to TFLite have one walk over the program in common. The walk resolves
calls, the choice of a platform and loops of known length, computes what does not depend on the
input, and leaves broadcasting to the operations that broadcast by themselves. A `Builder` emits
all other operations, one by one.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax.extend.core as jax_core
import numpy as np
from jax.export import is_symbolic_dim

from semiseg_jax.models.convolutions import Dim
from semiseg_jax.runtime.errors import UserError

# Operations that call another program, and the parameter that holds it.
_CALLS = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
_IDENTITIES = ("stop_gradient", "copy", "copy_p", "optimization_barrier")
_RESOLVED = (*_CALLS, *_IDENTITIES, "platform_index", "cond", "scan", "broadcast_in_dim")


@runtime_checkable
class Builder(Protocol):
    """Emits operations.

    Attributes:
        elementwise: names of JAX's operations that `emit_elementwise` knows.
        operations: names of JAX's operations that `emit` knows.
        format_name: of the format, for errors.
    """

    elementwise: dict[str, Any]
    operations: dict[str, Any]
    format_name: str

    def emit_elementwise(self, eqn: Any, operands: Sequence[Any]) -> Any:
        """Emits an operation whose operands are broadcast; returns the result."""

    def emit(self, eqn: Any, operands: Sequence[Any]) -> Sequence[Any]:
        """Emits another operation; returns its results."""

    def unsqueeze(self, operand: Any, axes: Sequence[int]) -> Any:
        """Inserts axes of length 1, which are given as positions in the result."""

    def expand(self, operand: Any, shape: Sequence[Dim]) -> Any:
        """Broadcasts to a shape of the same rank."""


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of the program.

    Attributes:
        content: a NumPy array, if the value is known, else what the builder returned.
        narrow: axes that have length 1 in `content` and another length in the program.
    """

    content: Any
    narrow: frozenset[int] = frozenset()

    @property
    def is_known(self) -> bool:
        """Whether the value does not depend on the input."""
        return isinstance(self.content, np.ndarray)


def rebuild(program: jax_core.ClosedJaxpr, builder: Builder, inputs: Sequence[Any]) -> list[Any]:
    """Emits the operations of a program.

    Args:
        program: as `jax.jit(f).trace(...).jaxpr` gives it; sizes may be symbolic if the builder
            knows `dim_as_value`.
        builder: emits the operations.
        inputs: the builder's form of the inputs.

    Returns:
        The builder's form of the outputs, or NumPy arrays.

    Raises:
        UserError: the builder does not know an operation; raised before any is emitted.
    """
    check_operations(program, builder)
    walk = _Walk(builder)
    outputs = walk.run(program.jaxpr, program.consts, [Value(x) for x in inputs])
    return [
        walk.expanded(value, var.aval.shape)
        for value, var in zip(outputs, program.jaxpr.outvars, strict=True)
    ]


def check_operations(program: jax_core.ClosedJaxpr, builder: Builder) -> None:
    """Raises a UserError that names the operations of a program that a builder does not know."""
    known = {*_RESOLVED, *builder.elementwise, *builder.operations}
    if unknown := sorted(operations(program) - known):
        raise UserError(
            f"--format={builder.format_name} cannot express {', '.join(unknown)}, which this "
            "network computes: export it with --format=saved_model or --format=stablehlo.",
            code="export-operation-unknown",
        )


def operations(program: jax_core.ClosedJaxpr) -> set[str]:
    """Returns the names of the operations that depend on the input of a program."""
    names: set[str] = set()
    _mark(program.jaxpr, [True] * len(program.jaxpr.invars), names)
    return names


def _mark(jaxpr: Any, depends: Sequence[bool], names: set[str]) -> list[bool]:
    """Adds the names of the operations that depend on some inputs; says which outputs do."""
    dependent = {var for var, flag in zip(jaxpr.invars, depends, strict=True) if flag}

    def is_dependent(atom: Any) -> bool:
        return not isinstance(atom, jax_core.Literal) and atom in dependent

    for eqn in jaxpr.eqns:
        flags = [is_dependent(atom) for atom in eqn.invars]
        if _is_numeric(eqn) and not any(flags):
            continue
        called = _called(eqn)
        if called is None:
            names.add(eqn.primitive.name)
            results = [True] * len(eqn.outvars)
        elif eqn.primitive.name == "scan":
            num_consts = eqn.params["num_consts"]
            for _ in flags:  # What one turn makes dependent, the next reads.
                results = _mark(called, flags, names)
                carry = zip(flags[num_consts:], results, strict=False)
                flags[num_consts:] = [before or after for before, after in carry]
        else:
            results = _mark(called, flags[len(flags) - len(called.invars) :], names)
        dependent |= {var for var, flag in zip(eqn.outvars, results, strict=True) if flag}
    return [is_dependent(atom) for atom in jaxpr.outvars]


def _called(eqn: Any) -> Any:
    """Returns the program that an operation calls, on the platform of the export; or None."""
    name = eqn.primitive.name
    if name == "cond":
        program = eqn.params["branches"][-1]
    elif name in (*_CALLS, "scan"):
        program = eqn.params[_CALLS.get(name, "jaxpr")]
    else:
        return None
    return getattr(program, "jaxpr", program)


class _Walk:
    """The state of `rebuild`."""

    def __init__(self, builder: Builder):
        self._builder = builder

    def run(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Value]) -> list[Value]:
        """Emits the operations of a program; returns its outputs."""
        values: dict[Any, Value] = {
            var: Value(np.asarray(const))
            for var, const in zip(jaxpr.constvars, consts, strict=True)
        }
        values |= dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Value:
            if isinstance(atom, jax_core.Literal):
                aval: Any = atom.aval
                return Value(np.asarray(atom.val, aval.dtype))
            return values[atom]

        for eqn in jaxpr.eqns:
            results = self._equation(eqn, [read(atom) for atom in eqn.invars])
            values |= dict(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Any, operands: list[Value]) -> list[Value]:
        name, params = eqn.primitive.name, eqn.params
        if name in _CALLS:
            return self._call(params[_CALLS[name]], operands)
        if name in _IDENTITIES or (
            name == "convert_element_type" and eqn.invars[0].aval.dtype == params["new_dtype"]
        ):
            return operands
        if name == "platform_index":
            # The last branch is that of every other platform: `lax.conv`.
            return [Value(np.asarray(len(params["platforms"]) - 1, np.int32))]
        if name == "cond":
            return self._call(self._branch(params, operands[0]), operands[1:])
        if name == "scan":
            return self._loop(params, operands)
        if name == "broadcast_in_dim" and len(operands) == 1:
            return [self._broadcast(eqn, operands[0])]
        if all(value.is_known for value in operands) and _is_numeric(eqn):
            return self._compute(eqn, operands)
        if name in self._builder.elementwise:
            return [self._elementwise(eqn, operands)]
        expanded = [
            self.expanded(value, atom.aval.shape)
            for value, atom in zip(operands, eqn.invars, strict=True)
        ]
        return [Value(result) for result in self._builder.emit(eqn, expanded)]

    def _call(self, program: Any, operands: Sequence[Value]) -> list[Value]:
        consts = getattr(program, "consts", ())
        return self.run(getattr(program, "jaxpr", program), consts, operands)

    def _branch(self, params: Mapping[str, Any], index: Value) -> Any:
        if not index.is_known:
            raise UserError(
                f"--format={self._builder.format_name} cannot express a choice by the content of "
                "the images, which this network makes: export it with --format=saved_model.",
                code="export-branch-unknown",
            )
        return params["branches"][int(index.content)]

    def _loop(self, params: Mapping[str, Any], operands: list[Value]) -> list[Value]:
        """Emits the body of a loop of known length as often as it runs."""
        consts, carry = operands[: params["num_consts"]], operands[params["num_consts"] :]
        if len(carry) != params["num_carry"]:
            raise UserError(
                f"--format={self._builder.format_name} cannot express a loop over an array, which "
                "this network has: export it with --format=saved_model.",
                code="export-loop-unknown",
            )
        for _ in range(params["length"]):
            carry = self._call(params["jaxpr"], [*consts, *carry])
        return carry

    def _broadcast(self, eqn: Any, operand: Value) -> Value:
        """Inserts axes of length 1; the operations that read the result broadcast them."""
        shape, kept = eqn.params["shape"], eqn.params["broadcast_dimensions"]
        inserted = [axis for axis in range(len(shape)) if axis not in kept]
        source = eqn.invars[0].aval.shape
        narrow = {axis for axis in inserted if shape[axis] != 1}
        for axis, position in enumerate(kept):
            if axis in operand.narrow or (source[axis] == 1 and shape[position] != 1):
                narrow.add(position)
        content = operand.content
        if inserted and operand.is_known:
            content = np.expand_dims(content, inserted)
        elif inserted:
            content = self._builder.unsqueeze(content, inserted)
        return Value(content, frozenset(narrow))

    def _elementwise(self, eqn: Any, operands: Sequence[Value]) -> Value:
        narrow = _common_narrow_axes(eqn, operands)
        return Value(
            self._builder.emit_elementwise(eqn, [value.content for value in operands]), narrow
        )

    def _compute(self, eqn: Any, operands: Sequence[Value]) -> list[Value]:
        """Computes the result of known operands, narrow where all of them are."""
        if eqn.primitive.name in self._builder.elementwise:
            narrow = _common_narrow_axes(eqn, operands)
            rank = len(eqn.outvars[0].aval.shape)
            # Scalars are broadcast to every rank.
            arrays = list(np.broadcast_arrays(*(value.content for value in operands)))
            if arrays[0].ndim < rank:
                arrays = [array.reshape((1,) * rank) for array in arrays]
            return [Value(np.asarray(eqn.primitive.bind(*arrays, **eqn.params)), narrow)]
        arrays = [
            np.broadcast_to(value.content, atom.aval.shape)
            for value, atom in zip(operands, eqn.invars, strict=True)
        ]
        results = eqn.primitive.bind(*arrays, **eqn.params)
        results = results if eqn.primitive.multiple_results else [results]
        return [Value(np.asarray(result)) for result in results]

    def expanded(self, value: Value, shape: Sequence[Dim]) -> Any:
        """Returns the content of a value with no axis narrow."""
        if not value.narrow:
            return value.content
        if value.is_known and not any(is_symbolic_dim(n) for n in shape):
            return np.broadcast_to(value.content, shape)
        return self._builder.expand(value.content, shape)


def _common_narrow_axes(eqn: Any, operands: Sequence[Value]) -> frozenset[int]:
    """Returns the axes of a result of broadcasting that are narrow in every operand."""
    shape = eqn.outvars[0].aval.shape
    narrow = {axis for axis, n in enumerate(shape) if n != 1}
    for value, atom in zip(operands, eqn.invars, strict=True):
        if atom.aval.shape or not shape:
            narrow &= value.narrow
    return frozenset(narrow)


def _is_numeric(eqn: Any) -> bool:
    """Returns whether all shapes of an operation are numbers."""
    atoms = (*eqn.invars, *eqn.outvars)
    symbolic = any(is_symbolic_dim(n) for atom in atoms for n in atom.aval.shape)
    return not symbolic and eqn.primitive.name != "dim_as_value"


def is_window(eqn: Any) -> bool:
    """Returns whether a gather takes one window along one axis, as a slice of a symbolic size."""
    numbers, rank = eqn.params["dimension_numbers"], len(eqn.invars[0].aval.shape)
    return (
        len(numbers.start_index_map) == 1
        and not numbers.collapsed_slice_dims
        and not numbers.operand_batching_dims
        and eqn.invars[1].aval.shape == (1,)
        and numbers.offset_dims == tuple(range(rank))
    )


def taken_axis(format_name: str, eqn: Any) -> int:
    """Returns the axis of a gather that takes whole slices along one axis, as `jnp.take` does.

    Raises:
        UserError: it is a gather of another form.
    """
    numbers, shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    axes = numbers.start_index_map
    result_rank = len(eqn.outvars[0].aval.shape)
    batch = [axis for axis in range(result_rank) if axis not in numbers.offset_dims]
    whole = [n for axis, n in enumerate(shape) if axis not in axes]
    sizes = [n for axis, n in enumerate(eqn.params["slice_sizes"]) if axis not in axes]
    if (
        len(axes) != 1
        or numbers.collapsed_slice_dims != axes
        or batch != list(range(axes[0], axes[0] + len(batch)))
        or numbers.operand_batching_dims
        or whole != sizes
    ):
        raise form_error(format_name, eqn)
    return axes[0]


def form_error(format_name: str, eqn: Any) -> UserError:
    """Returns the error for an operation in a form that a format does not have."""
    return UserError(
        f"--format={format_name} cannot express {eqn.primitive.name} in the form in which this "
        "network computes it: export it with --format=saved_model or --format=stablehlo.",
        code="export-form-unknown",
    )
