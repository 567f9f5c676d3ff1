"""An ONNX graph under construction: its nodes, its constants, and sizes known only when it runs."""

import ast
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from jax.export import is_symbolic_dim
from onnx import helper, numpy_helper

from semiseg_jax.models.convolutions import Dim

# Of 2022 and 2024: what onnxruntime has read since 1.14 and 1.18.
OPSET, IR_VERSION = 18, 10


class OnnxGraph:
    """Names of tensors are the values; a NumPy array is a value too.

    Attributes:
        nodes: in the order of computation.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[Any, tuple[str, np.ndarray]] = {}
        self._sizes: dict[str, str] = {}
        self._count = 0

    def node(self, kind: str, *inputs: Any, outputs: int | Sequence[str] = 1, **attributes) -> Any:
        """Appends an operation; returns the name of its result, or a list of several names."""
        if isinstance(outputs, int):
            names = [self._new_name() for _ in range(outputs)]
        else:
            names = list(outputs)
        inputs = tuple(self.tensor(value) for value in inputs)
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names[0] if len(names) == 1 else names

    def _new_name(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def tensor(self, value: Any) -> str:
        """Returns the name of a value; equal constants have one name."""
        if isinstance(value, str):
            return value
        array = np.ascontiguousarray(value).reshape(np.shape(value))
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self._constants:
            self._constants[key] = self._new_name(), array
        return self._constants[key][0]

    # --- Sizes -----------------------------------------------------------------------------------

    def name_sizes(self, images: str, shape: Sequence[Dim]) -> None:
        """Reads the symbols of a shape, such as n, h and w, from an input of that shape."""
        dims = self.node("Shape", images)
        for axis, n in enumerate(shape):
            if is_symbolic_dim(n):
                index = np.asarray([axis], np.int64)
                self._sizes[str(n)] = self.node("Gather", dims, index)

    def size(self, dim: Dim) -> Any:
        """Returns a length as int64 [1]; an expression of symbols is computed by nodes."""
        if not is_symbolic_dim(dim):
            return np.asarray([dim], np.int64)
        text = str(dim)
        if text not in self._sizes:
            # The text of an expression is its documented form: `jax.export.symbolic_shape`.
            self._sizes[text] = self._evaluate(ast.parse(text, mode="eval").body)
        return self._sizes[text]

    def sizes(self, dims: Sequence[Dim]) -> Any:
        """Returns a shape as int64 [rank]."""
        if not any(is_symbolic_dim(n) for n in dims):
            return np.asarray(dims, np.int64)
        return self.node("Concat", *(self.size(n) for n in dims), axis=0)

    def _evaluate(self, expression: ast.expr) -> Any:
        if (text := ast.unparse(expression)) in self._sizes:
            return self._sizes[text]
        match expression:
            case ast.Constant(value):
                return np.asarray([value], np.int64)
            case ast.UnaryOp(ast.USub(), operand):
                return self._integers("Sub", np.zeros(1, np.int64), self._evaluate(operand))
            case ast.BinOp(left, kind, right):
                name = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul", ast.Pow: "Pow"}
                operands = self._evaluate(left), self._evaluate(right)
                result = self._integers(name[type(kind)], *operands)
            case ast.Call(ast.Name(function), arguments):
                operands = tuple(self._evaluate(argument) for argument in arguments)
                names = {"max": "Max", "min": "Min", "mod": "Mod", "floordiv": "FloorDiv"}
                result = self._integers(names[function], *operands)
            case _:
                raise ValueError(f"{text} is not a form of a size that JAX documents")
        self._sizes[text] = result
        return result

    def _integers(self, kind: str, left: Any, right: Any) -> Any:
        """Computes with int64 [1], at once if both are known."""
        if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
            return _KNOWN[kind](left, right)
        if kind == "FloorDiv":
            # Div rounds towards 0, and Mod has the sign of the divisor.
            return self.node("Div", self.node("Sub", left, self.node("Mod", left, right)), right)
        return self.node(kind, left, right)

    # --- The file --------------------------------------------------------------------------------

    def model(
        self,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        metadata: dict[str, str],
        producer_version: str,
    ) -> onnx.ModelProto:
        """Returns the checked model."""
        constants = [numpy_helper.from_array(a, name) for name, a in self._constants.values()]
        graph = helper.make_graph(self.nodes, "segmentation", inputs, outputs, constants)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="semiseg_jax",
            producer_version=producer_version,
        )
        helper.set_model_props(model, metadata)
        onnx.checker.check_model(model)
        return model


_KNOWN: dict[str, Callable[..., Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Pow": operator.pow,
    "Max": np.maximum,
    "Min": np.minimum,
    "Mod": operator.mod,
    "FloorDiv": operator.floordiv,
}
