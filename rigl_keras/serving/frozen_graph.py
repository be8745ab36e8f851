"""A function of TensorFlow as a graph without variables and calls."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from rigl_keras import _keras
from rigl_keras._text import first_line

__all__ = ["FrozenGraph", "captured", "freeze"]

# The attribute of a function that says what it computes.
_IMPLEMENTS = "_implements"
_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_SHAPES = ("Shape", "ShapeN", "Size")


@dataclasses.dataclass
class FrozenGraph:
    """A graph, and its constant parts.

    Attributes:
        graph: The graph.
        inputs: `{name: tensor}` of the arguments.
        outputs: `{name: tensor}` of the results.
        captures: `{name of a tensor: its source}` for what the function holds
            besides variables, such as tables.
        session: Computes parts of it.
        constants: `{name of a tensor: array}` of the constants that other
            operations read.
        constant_operations: Names of operations whose results are constant.
        marks: `{name of an operation: mark}` of calls that were not inlined,
            because their functions are marked.
    """

    graph: tf.Graph
    inputs: dict[str, tf.Tensor]
    outputs: dict[str, tf.Tensor]
    captures: dict[str, tf.Tensor]
    session: tf.compat.v1.Session
    constants: dict[str, np.ndarray]
    constant_operations: set[str]
    marks: dict[str, str]

    def contents(
        self,
        tensor: tf.Tensor,
        shape_of: Callable[[str], tuple[int, ...] | None],
    ) -> np.ndarray | None:
        """Returns the value of a tensor, given the shapes of others.

        Args:
            tensor: A tensor that depends on shapes only, such as the second
                input of a Reshape.
            shape_of: Returns the shape of a tensor by its name, or None.

        Returns:
            Its value, or None if it depends on something else.
        """
        if tensor.name in self.constants:
            return self.constants[tensor.name]
        fed, waiting, seen = {}, [tensor.op], set()
        while waiting:
            operation = waiting.pop()
            name = operation.name
            if name in seen or name in self.constant_operations:
                continue
            seen.add(name)
            if operation.type in _SHAPES:
                for source, output in zip(
                    operation.inputs, operation.outputs, strict=True
                ):
                    lengths = shape_of(source.name)
                    if lengths is None:
                        return None
                    shape = np.array(lengths)
                    if operation.type == "Size":
                        shape = shape.prod()
                    fed[output] = shape.astype(output.dtype.as_numpy_dtype)
            elif operation.inputs:
                waiting += [source.op for source in operation.inputs]
            else:
                return None
        return np.asarray(self.session.run(tensor, fed))


def freeze(function: Any) -> FrozenGraph:
    """Returns the graph of a concrete function.

    Args:
        function: Concrete function with named arguments that returns a dict, as
            `tf.function` makes of `serve(**inputs)`.
    """
    names = sorted(function.structured_input_signature[1])
    pruned = _pruned(function, names)
    try:
        definition = _keras.frozen(pruned)
    except ValueError as error:
        raise ValueError(
            "The function's variables cannot be made constants: "
            f"{first_line(error)}"
        ) from error
    graph = tf.Graph()
    definition = _inlined(graph, definition)
    _keras.define_functions(definition)
    with graph.as_default():
        tf.graph_util.import_graph_def(definition, name="")

    def tensors(named):
        return {
            name: graph.get_tensor_by_name(tensor.name)
            for name, tensor in named
        }

    fed = zip(names, pruned.inputs[: len(names)], strict=True)
    made = zip(sorted(function.structured_outputs), pruned.outputs, strict=True)
    kept = {f"{node.name}:0" for node in definition.node}
    constant = _constant_operations(graph)
    session = _session(graph)
    return FrozenGraph(
        graph=graph,
        inputs=tensors(fed),
        outputs=tensors(made),
        captures={
            inner.name: outer
            for outer, inner in pruned.graph.captures
            if inner.name in kept
        },
        session=session,
        constants=_constants(session, constant),
        constant_operations=constant,
        marks=_marks(definition),
    )


def _pruned(function, names):
    """Returns a function with the same results that assigns nothing.

    TensorFlow does not freeze functions that assign variables, and Keras's
    recurrent layers update the seeds of their dropout at inference, too.
    """
    graph = function.graph
    assigned = [
        operation
        for operation in graph.get_operations()
        if operation.type.startswith("Assign")
    ]
    if not assigned:
        return function
    definition = graph.as_graph_def()
    live = _live(function.outputs)
    for operation in assigned:
        if operation.name not in live:
            changed = operation.inputs[0]
            if changed.op.name in live:
                raise ValueError(
                    "The function changes what it reads "
                    f"({changed.op.name}), as a recurrent layer with "
                    "stateful=True does: it is more than a function of its "
                    "inputs."
                )
    kept = [node for node in definition.node if node.name in live]
    del definition.node[:]
    for node in kept:
        if node.op == "Placeholder":
            continue
        inputs = [name for name in node.input if not name.startswith("^")]
        copy = definition.node.add()
        copy.CopyFrom(node)
        del copy.input[:]
        copy.input.extend(inputs)
        copy.attr.pop("_class", None)
    arguments = {
        tensor.name: name
        for name, tensor in zip(names, function.inputs, strict=False)
        if tensor.op.name in live
    }
    captures = {
        inner.name: outer
        for outer, inner in graph.captures
        if inner.op.name in live
    }

    @tf.function(autograph=False)
    def pruned(**inputs):
        for variable in function.variables:
            variable.read_value()  # tells TensorFlow that it is read
        values = {inner: inputs[name] for inner, name in arguments.items()}
        values |= captured(captures)
        made = tf.graph_util.import_graph_def(
            definition,
            input_map=values,
            return_elements=[tensor.name for tensor in function.outputs],
            name="",
        )
        return list(made)

    return pruned.get_concrete_function(
        **function.structured_input_signature[1]
    )


def captured(tensors: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Returns eager tensors, by name, as captures of the traced function."""
    graph: Any = tf.compat.v1.get_default_graph()
    return {name: graph.capture(tensor) for name, tensor in tensors.items()}


def _live(outputs):
    """Returns the names of the operations that compute outputs."""
    live, waiting = set(), [tensor.op for tensor in outputs]
    while waiting:
        operation = waiting.pop()
        if operation.name not in live:
            live.add(operation.name)
            waiting += [source.op for source in operation.inputs]
    return live


def _constant_operations(graph):
    names = set()
    for operation in graph.get_operations():
        if operation.type == "Const" or (
            operation.inputs
            and not operation.op_def.is_stateful
            and all(source.op.name in names for source in operation.inputs)
        ):
            names.add(operation.name)
    return names


def _session(graph):
    """Returns a session that computes only what it is asked for."""
    config = tf.compat.v1.ConfigProto()
    rewriting = config.graph_options.rewrite_options
    rewriting.disable_meta_optimizer = True
    return tf.compat.v1.Session(graph=graph, config=config)


def _constants(session, constant):
    """Returns the values at the borders of the constant parts."""
    wanted = {
        source.name: source
        for operation in session.graph.get_operations()
        if operation.name not in constant
        for source in operation.inputs
        if source.op.name in constant
        and source.dtype not in (tf.variant, tf.resource)
    }
    return session.run(wanted) if wanted else {}


def _marks(definition):
    """Returns `{name of a call: the mark of its function}`."""
    marked = {
        f.signature.name: f.attr[_IMPLEMENTS].s.decode()
        for f in definition.library.function
        if _IMPLEMENTS in f.attr
    }
    return {
        node.name: marked[node.attr["f"].func.name]
        for node in definition.node
        if node.op in _CALLS and node.attr["f"].func.name in marked
    }


def _inlined(graph, definition):
    """Returns a graph's definition with calls replaced by their bodies.

    Calls of marked functions stay.
    """
    while True:
        library = {
            f.signature.name: f
            for f in definition.library.function
            if _IMPLEMENTS not in f.attr
        }
        calls = {
            node.name: library[node.attr["f"].func.name]
            for node in definition.node
            if node.op in _CALLS and node.attr["f"].func.name in library
        }
        if not calls:
            return definition
        inlined = tf.compat.v1.GraphDef()
        inlined.library.CopyFrom(definition.library)
        inlined.versions.CopyFrom(definition.versions)
        renamed = {}
        for node in definition.node:
            if node.name in calls:
                body, results = _body(graph, node, calls[node.name])
                inlined.node.extend(body)
                for i, result in enumerate(results):
                    renamed[f"{node.name}:{i}"] = result
            else:
                inlined.node.add().CopyFrom(node)
        for node in inlined.node:
            inputs = [_flat(name) for name in node.input]
            for i, name in enumerate(inputs):
                while name in renamed:
                    name = _flat(renamed[name])
                inputs[i] = name
            del node.input[:]
            # Control inputs from calls that are gone.
            node.input.extend(
                name for name in inputs if name.removeprefix("^") not in calls
            )
        definition = inlined


def _flat(name):
    """Returns `node:0` for `node`."""
    return name if ":" in name or name.startswith("^") else f"{name}:0"


def _body(graph, call, function):
    """Returns the nodes of a called function, and its results' names."""
    data = [name for name in call.input if not name.startswith("^")]
    known = {
        argument.name: name
        for argument, name in zip(
            function.signature.input_arg, data, strict=True
        )
    }
    for node in function.node_def:
        first = 0
        for output in graph.op_def_for_type(node.op).output_arg:
            count = 1
            if output.number_attr:
                count = node.attr[output.number_attr].i
            elif output.type_list_attr:
                count = len(node.attr[output.type_list_attr].list.type)
            for i in range(count):
                known[f"{node.name}:{output.name}:{i}"] = (
                    f"{call.name}/{node.name}:{first + i}"
                )
            first += count
    body = []
    for node in function.node_def:
        copy = tf.compat.v1.NodeDef()
        copy.CopyFrom(node)
        copy.name = f"{call.name}/{node.name}"
        del copy.input[:]
        copy.input.extend(
            known[name]
            for name in node.input
            if not name.startswith("^") and name in known
        )
        copy.input.extend(
            f"^{call.name}/{name[1:]}"
            for name in node.input
            if name.startswith("^") and name[1:] not in known
        )
        body.append(copy)
    results = [
        known[function.ret[r.name]] for r in function.signature.output_arg
    ]
    return body, results
