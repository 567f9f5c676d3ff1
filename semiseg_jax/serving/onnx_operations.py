"""JAX's operations in ONNX, for `jaxpr_program.rebuild`."""

import string
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax
from jax.export import is_symbolic_dim
from onnx import helper

from semiseg_jax.models.convolutions import Dim
from semiseg_jax.serving.jaxpr_program import form_error, is_window, taken_axis
from semiseg_jax.serving.onnx_graph import OnnxGraph

# Operations that have the same meaning in ONNX under another name.
_RENAMED = {
    "abs": "Abs",
    "add": "Add",
    "and": "And",
    "cos": "Cos",
    "div": "Div",
    "eq": "Equal",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "log": "Log",
    "logistic": "Sigmoid",
    "lt": "Less",
    "max": "Max",
    "min": "Min",
    "mul": "Mul",
    "neg": "Neg",
    "not": "Not",
    "or": "Or",
    "pow": "Pow",
    "sign": "Sign",
    "sin": "Sin",
    "sqrt": "Sqrt",
    "sub": "Sub",
    "tanh": "Tanh",
}


class OnnxBuilder:
    """Appends the ONNX form of JAX's operations to a graph; see `jaxpr_program.Builder`.

    Attributes:
        graph: the graph.
    """

    format_name = "onnx"

    def __init__(self, graph: OnnxGraph):
        self.graph = graph
        self.elementwise: dict[str, Any] = {
            **dict.fromkeys(_RENAMED, self._renamed),
            "clamp": self._clamp,
            "convert_element_type": self._convert,
            "erfc": self._erfc,
            "integer_pow": self._integer_pow,
            "ne": self._not_equal,
            "rem": self._rem,
            "rsqrt": self._rsqrt,
            "select_n": self._select,
            "shift_right_arithmetic": self._shift_right,
            "square": self._square,
        }
        self.operations: dict[str, Any] = {
            "argmax": self._argmax,
            "concatenate": self._concatenate,
            "conv_general_dilated": self._conv,
            "dim_as_value": self._size,
            "dot_general": self._dot,
            "gather": self._gather,
            "iota": self._iota,
            "pad": self._pad,
            "reduce_max": self._reduce,
            "reduce_min": self._reduce,
            "reduce_sum": self._reduce,
            "reshape": self._reshape,
            "slice": self._slice,
            "split": self._split,
            "squeeze": self._squeeze,
            "tile": self._tile,
            "transpose": self._transpose,
        }

    def emit_elementwise(self, eqn: Any, operands: Sequence[Any]) -> Any:
        """Appends an operation whose operands ONNX broadcasts."""
        return self.elementwise[eqn.primitive.name](eqn, *operands)

    def emit(self, eqn: Any, operands: Sequence[Any]) -> Sequence[Any]:
        """Appends another operation."""
        results = self.operations[eqn.primitive.name](eqn, *operands)
        return results if isinstance(results, list) else [results]

    def unsqueeze(self, operand: Any, axes: Sequence[int]) -> Any:
        """Inserts axes of length 1."""
        return self.graph.node("Unsqueeze", operand, np.asarray(axes, np.int64))

    def expand(self, operand: Any, shape: Sequence[Dim]) -> Any:
        """Broadcasts to a shape."""
        return self.graph.node("Expand", operand, self.graph.sizes(shape))

    # --- Element by element ----------------------------------------------------------------------

    def _renamed(self, eqn: Any, *operands: Any) -> Any:
        return self.graph.node(_RENAMED[eqn.primitive.name], *operands)

    def _clamp(self, eqn: Any, low: Any, x: Any, high: Any) -> Any:
        return self.graph.node("Min", self.graph.node("Max", x, low), high)

    def _convert(self, eqn: Any, x: Any) -> Any:
        return self._cast(x, eqn.params["new_dtype"])

    def _cast(self, x: Any, dtype: Any) -> Any:
        return self.graph.node("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def _erfc(self, eqn: Any, x: Any) -> Any:
        one = np.ones((), eqn.invars[0].aval.dtype)
        return self.graph.node("Sub", one, self.graph.node("Erf", x))

    def _integer_pow(self, eqn: Any, x: Any) -> Any:
        return self.graph.node("Pow", x, np.asarray(eqn.params["y"], eqn.invars[0].aval.dtype))

    def _not_equal(self, eqn: Any, left: Any, right: Any) -> Any:
        return self.graph.node("Not", self.graph.node("Equal", left, right))

    def _rem(self, eqn: Any, left: Any, right: Any) -> Any:
        return self.graph.node("Mod", left, right, fmod=1)

    def _rsqrt(self, eqn: Any, x: Any) -> Any:
        return self.graph.node("Reciprocal", self.graph.node("Sqrt", x))

    def _select(self, eqn: Any, which: Any, first: Any, second: Any) -> Any:
        return self.graph.node("Where", which, second, first)

    def _shift_right(self, eqn: Any, x: Any, bits: Any) -> Any:
        """Divides by a power of 2 and rounds down; Div rounds towards 0."""
        power = np.left_shift(np.ones((), eqn.invars[0].aval.dtype), _known(bits, eqn))
        rest = self.graph.node("Mod", x, power)
        return self.graph.node("Div", self.graph.node("Sub", x, rest), power)

    def _square(self, eqn: Any, x: Any) -> Any:
        return self.graph.node("Mul", x, x)

    # --- Other operations ------------------------------------------------------------------------

    def _argmax(self, eqn: Any, x: Any) -> Any:
        (axis,) = eqn.params["axes"]
        index = self.graph.node("ArgMax", x, axis=axis, keepdims=0)
        return self._cast(index, eqn.params["index_dtype"])

    def _concatenate(self, eqn: Any, *parts: Any) -> Any:
        return self.graph.node("Concat", *parts, axis=eqn.params["dimension"])

    def _conv(self, eqn: Any, x: Any, kernel: Any) -> Any:
        params = eqn.params
        if {*params["lhs_dilation"], params["batch_group_count"]} != {1}:
            raise form_error("onnx", eqn)
        numbers = params["dimension_numbers"]
        low, high = zip(*params["padding"], strict=True)
        y = self.graph.node(
            "Conv",
            self.graph.node("Transpose", x, perm=numbers.lhs_spec),
            _known(kernel, eqn).transpose(numbers.rhs_spec),
            strides=params["window_strides"],
            pads=[*low, *high],
            dilations=params["rhs_dilation"],
            group=params["feature_group_count"],
        )
        return self.graph.node("Transpose", y, perm=np.argsort(numbers.out_spec))

    def _size(self, eqn: Any) -> Any:
        scalar = self.graph.node("Squeeze", self.graph.size(eqn.params["dim"]))
        return self._cast(scalar, eqn.outvars[0].aval.dtype)

    def _dot(self, eqn: Any, left: Any, right: Any) -> Any:
        (contracted, batch) = eqn.params["dimension_numbers"]
        ranks = [len(atom.aval.shape) for atom in eqn.invars]
        if contracted == ((ranks[0] - 1,), (0,)) and ranks[1] == 2 and not batch[0]:
            return self.graph.node("MatMul", left, right)
        letters = iter(string.ascii_lowercase)
        names: list[dict[int, str]] = [{}, {}]
        for pairs in (batch, contracted):
            for axes in zip(*pairs, strict=True):
                letter = next(letters)
                for side, axis in enumerate(axes):
                    names[side][axis] = letter
        result = [names[0][axis] for axis in batch[0]]
        for side in (0, 1):
            for axis in range(ranks[side]):
                if axis not in names[side]:
                    names[side][axis] = next(letters)
                    result.append(names[side][axis])
        terms = ["".join(names[side][a] for a in range(ranks[side])) for side in (0, 1)]
        equation = f"{terms[0]},{terms[1]}->{''.join(result)}"
        return self.graph.node("Einsum", left, right, equation=equation)

    def _gather(self, eqn: Any, x: Any, indices: Any) -> Any:
        """Takes slices along one axis."""
        if is_window(eqn):
            return self._window(eqn, x, indices)
        axis = taken_axis("onnx", eqn)
        last = np.asarray([-1], np.int64)
        index = self.graph.node("Squeeze", indices, last)
        if eqn.params["mode"] == lax.GatherScatterMode.CLIP:
            dtype = eqn.invars[1].aval.dtype
            size = self.graph.node("Squeeze", self.graph.size(eqn.invars[0].aval.shape[axis]))
            largest = self._cast(self.graph.node("Sub", size, np.ones((), np.int64)), dtype)
            index = self.graph.node(
                "Min", self.graph.node("Max", index, np.zeros((), dtype)), largest
            )
        return self.graph.node("Gather", x, index, axis=axis)

    def _window(self, eqn: Any, x: Any, start: Any) -> Any:
        """Takes one window, which begins at `start` along one axis."""
        (axis,) = eqn.params["dimension_numbers"].start_index_map
        start = self._cast(start, np.int64)
        end = self.graph.node("Add", start, self.graph.size(eqn.params["slice_sizes"][axis]))
        return self.graph.node("Slice", x, start, end, np.asarray([axis], np.int64))

    def _iota(self, eqn: Any) -> Any:
        shape, axis, dtype = (eqn.params[key] for key in ("shape", "dimension", "dtype"))
        size = self.graph.node("Squeeze", self.graph.size(shape[axis]))
        positions = self.graph.node("Range", np.zeros((), np.int64), size, np.ones((), np.int64))
        positions = self._cast(positions, dtype)
        if len(shape) == 1:
            return positions
        others = [other for other in range(len(shape)) if other != axis]
        return self.expand(self.unsqueeze(positions, others), shape)

    def _pad(self, eqn: Any, x: Any, value: Any) -> Any:
        low, high, interior = zip(*eqn.params["padding_config"], strict=True)
        if any(n != 0 for n in interior):
            raise form_error("onnx", eqn)
        if all(n == 0 for n in (*low, *high)):
            return x
        return self.graph.node("Pad", x, self.graph.sizes([*low, *high]), value)

    def _reduce(self, eqn: Any, x: Any) -> Any:
        kinds = {"reduce_max": "ReduceMax", "reduce_min": "ReduceMin", "reduce_sum": "ReduceSum"}
        axes = np.asarray(eqn.params["axes"], np.int64)
        return self.graph.node(kinds[eqn.primitive.name], x, axes, keepdims=0)

    def _reshape(self, eqn: Any, x: Any) -> Any:
        sizes = list(eqn.params["new_sizes"])
        symbolic = [axis for axis, n in enumerate(sizes) if is_symbolic_dim(n)]
        if len(symbolic) == 1:
            sizes[symbolic[0]] = -1
        return self.graph.node("Reshape", x, self.graph.sizes(sizes))

    def _slice(self, eqn: Any, x: Any) -> Any:
        start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
        strides = eqn.params["strides"] or (1,) * len(start)
        shape = eqn.invars[0].aval.shape
        axes = [
            axis
            for axis, n in enumerate(shape)
            if (start[axis], limit[axis], strides[axis]) != (0, n, 1)
        ]
        if not axes:
            return x
        bounds = [[each[axis] for axis in axes] for each in (start, limit, strides)]
        starts, ends, steps = (self.graph.sizes(each) for each in bounds)
        return self.graph.node("Slice", x, starts, ends, np.asarray(axes, np.int64), steps)

    def _split(self, eqn: Any, x: Any) -> Any:
        sizes = eqn.params["sizes"]
        parts = self.graph.node(
            "Split", x, self.graph.sizes(sizes), outputs=len(sizes), axis=eqn.params["axis"]
        )
        return parts if isinstance(parts, list) else [parts]

    def _squeeze(self, eqn: Any, x: Any) -> Any:
        return self.graph.node("Squeeze", x, np.asarray(eqn.params["dimensions"], np.int64))

    def _tile(self, eqn: Any, x: Any) -> Any:
        return self.graph.node("Tile", x, self.graph.sizes(eqn.params["reps"]))

    def _transpose(self, eqn: Any, x: Any) -> Any:
        return self.graph.node("Transpose", x, perm=eqn.params["permutation"])


def _known(value: Any, eqn: Any) -> np.ndarray:
    """Returns an operand that must not depend on the images."""
    if not isinstance(value, np.ndarray):
        raise form_error("onnx", eqn)
    return value
