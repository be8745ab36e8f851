"""Every private name of Keras and TensorFlow that this package uses.

Neither promises to keep these names. Each function here says why it is needed
and what stops working without it. A new version of Keras or TensorFlow needs
changes in this file alone.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import keras
import tensorflow as tf
from keras.src.backend.common import global_state as _global_state
from tensorflow.python.eager import context as _context
from tensorflow.python.eager import record as _record
from tensorflow.python.framework import convert_to_constants as _constants
from tensorflow.python.ops import custom_gradient as _custom_gradient

__all__ = [
    "CheckpointedAsFloats",
    "LOOKUP_STATE",
    "accumulated_batches",
    "applies_default_build",
    "assign_now",
    "check_file_of_layer",
    "compute_loss",
    "computing_in_double",
    "converted_as_here",
    "define_functions",
    "direct_variables",
    "direct_weights",
    "drop_accumulated_gradients",
    "flatten_layers",
    "frozen",
    "given_replica_sum",
    "has_loss",
    "inbound_nodes",
    "is_bookkeeping",
    "is_compiled_by_xla",
    "is_in_step_of_keras",
    "is_training",
    "keeping_losses",
    "like_function",
    "may_differentiate",
    "operation_of",
    "owned_layers",
    "replace_calls",
    "replace_in_functional",
    "replace_in_sequential",
    "replace_tracked",
    "replica_sum",
    "restored_epoch",
    "set_replica_sum",
    "stored_value",
    "trained_variables",
    "unpickler",
    "wrap_custom_gradients",
]

Layer = keras.layers.Layer

# Lookup layers keep these outside of variables. Without them a copy of an
# adapted StringLookup has an empty vocabulary.
LOOKUP_STATE = ("_frozen_vocab_size", "_has_input_vocabulary")


# Layers and models.


def flatten_layers(layer: Layer) -> list[Layer]:
    """Returns a layer and all layers within it, at any depth.

    `Model.layers` lists one level, and a layer has no such list. Without this
    function masking, export and counting miss nested layers.
    """
    return layer._flatten_layers()


def owned_layers(layer: Layer) -> list[Layer]:
    """Returns the layers that a layer owns directly, in tracking order.

    For a layer that is not a model, no public list has them. Without this
    function layers within layers are neither found nor copied.
    """
    return layer._layers


_OF_LAYERS = ("_layers", "_metrics", "_tracker", "_obj_reference_counts_dict")
_OF_GRAPHS = ("_functional", "_operations", "_operations_by_depth")


def is_bookkeeping(attribute: str, *, of_graph: bool) -> bool:
    """Returns whether an attribute is one of Keras's or TensorFlow's lists.

    Without this function each layer that is an attribute is found twice.

    Args:
        attribute: Name of an attribute of a layer or model.
        of_graph: Whether it is one of a Sequential or Functional model.
    """
    return (
        attribute in _OF_LAYERS
        or attribute.startswith("_self_")
        or (of_graph and attribute in _OF_GRAPHS)
    )


def direct_weights(layer: Layer) -> list[keras.Variable]:
    """Returns a layer's trained weights, without those of inner layers.

    Frozen weights are included. `trainable_variables` omits them, and lists
    those of inner layers. Without this function frozen weights are not counted.
    """
    return layer._trainable_variables


def direct_variables(layer: Layer) -> list[keras.Variable]:
    """Returns all variables of a layer, without those of inner layers.

    Without this function the state of a copy (statistics, seeds) cannot be
    paired layer by layer with that of the original.
    """
    return [
        *layer._trainable_variables,
        *layer._non_trainable_variables,
        *(generator.state for generator in layer._seed_generators),
    ]


@contextlib.contextmanager
def keeping_losses(model: keras.Model) -> Iterator[None]:
    """Within the context, calls do not change what `model.losses` returns.

    A call clears the losses of the previous call. Without this function
    counting FLOPs loses a model's activity penalties.
    """
    before = [(part, list(part._losses)) for part in flatten_layers(model)]
    try:
        yield
    finally:
        for part, losses in before:
            part._losses[:] = losses


@contextlib.contextmanager
def computing_in_double(model: keras.Model) -> Iterator[None]:
    """Within the context, all layers of a model compute in float64.

    Their variables keep their type. A policy has one name for both, except in
    half precision. Without this function sums over all paths of a deep network
    overflow.
    """
    policy = keras.DTypePolicy("float32")
    policy._compute_dtype = "float64"
    parts = flatten_layers(model)
    before = [part.dtype_policy for part in parts]
    try:
        for part in parts:
            part.dtype_policy = policy
        yield
    finally:
        for part, own in zip(parts, before, strict=True):
            part.dtype_policy = own


def inbound_nodes(layer: Layer) -> list:
    """Returns the symbolic calls of a layer.

    `layer.input` fails for a layer that is called twice. Without this function
    products are not chosen before the first batch.
    """
    return layer._inbound_nodes


def applies_default_build(layer: Layer) -> bool:
    """Returns whether a layer does not override `build`.

    A call builds such a layer. Without this function a masked one cannot be
    loaded.
    """
    return getattr(type(layer).build, "_is_default", False)


def operation_of(tensor: Any) -> Any:
    """Returns the layer or operation that a symbolic tensor comes from.

    Without this function copies of a model forget optional inputs.
    """
    return tensor._keras_history.operation


def unpickler() -> Callable:
    """Returns the function with which Keras restores a pickled model.

    A class made while the program runs cannot be pickled by its name. Without
    this function subclassed models with masks cannot be pickled or deep-copied.
    """
    return keras.Model._unpickle_model


def check_file_of_layer(layer: Layer, store: Mapping) -> None:
    """Checks that a file holds as many variables as a layer has.

    Keras checks this in `load_own_variables`, but a masked layer must refuse a
    bad file earlier. Without this function the later error does not name what
    is missing.
    """
    layer._check_load_own_variables(store)


def restored_epoch(model: keras.Model) -> int | None:
    """Returns the epoch that `BackupAndRestore` resumes, or None.

    Without this function a run cut off in epoch 0 counts as a new one.
    """
    return getattr(model, "_initial_epoch", None)


def is_training() -> bool:
    """Returns whether the current layer is called for training.

    Not every layer takes `training`, and outer layers pass it to inner ones
    through a context. Without this function a layer that does not take it
    multiplies its kernel by its mask at each call.
    """
    context = _global_state.get_global_attribute("current_call_ctx")
    return bool(context is not None and context.get_value("training"))


def has_loss(model: keras.Model) -> bool:
    """Returns whether a model was compiled with a loss.

    Without this function the loss of an update's batch is evaluated for models
    that have none: that fails, or gives the penalties alone.
    """
    return getattr(model, "_compile_loss", None) is not None


def compute_loss(model: keras.Model, **arguments) -> tf.Tensor:
    """Returns a model's loss, however its `compute_loss` is written.

    Models may override `compute_loss` with or without the argument `training`.
    Without this function an override that takes none cannot be watched.
    """
    return cast(tf.Tensor, model._compute_loss(**arguments))


# Changes of a model in place. Keras itself can only make a new model.


def replace_calls(old: Layer, new: Layer) -> None:
    """Moves the symbolic calls of a layer to another layer.

    A Functional model is made of these calls. Its tensors stay the same, so a
    model can still be made from any of them. Without this function a Functional
    model that has its own constructor cannot be masked.
    """
    new._inbound_nodes, new._outbound_nodes = (
        old._inbound_nodes,
        old._outbound_nodes,
    )
    old._inbound_nodes, old._outbound_nodes = [], []
    for node in new._inbound_nodes:
        node.operation = new
        for tensor in node.outputs:
            history = getattr(tensor, "_keras_history", None)
            if history is not None and history.operation is old:
                tensor._keras_history = history._replace(operation=new)


def replace_tracked(
    owner: Layer, changes: Mapping[int, tuple[Layer, Layer]]
) -> None:
    """Makes a built layer own other layers instead of those it owns.

    Keras locks what a built layer owns. Without this function models cannot be
    masked in place.

    Args:
        owner: A layer or model.
        changes: `{id of the old layer: (old layer, new layer)}`.
    """
    tracker = owner._tracker
    for old, new in changes.values():
        # At the same position: weights come in the order of the layers.
        if tracker.is_in_store("layers", old):
            if tracker.is_in_store("layers", new):
                tracker.untrack(old)
            else:
                tracker.replace_tracked_value("layers", old, new)


def replace_in_functional(
    model: keras.Model, changes: Mapping[int, tuple[Layer, Layer]]
) -> None:
    """Replaces layers in the graph of a Functional model.

    Without this function a Functional model that has its own constructor cannot
    be masked.

    Args:
        model: A Functional model.
        changes: As in `replace_tracked`.
    """

    def changed(operation):
        return changes.get(id(operation), (None, operation))[1]

    replace_tracked(model, changes)
    # A new list: TensorFlow does not save a list that was changed.
    model._operations = [changed(o) for o in model._operations]
    for operations in model._operations_by_depth.values():
        operations[:] = [changed(operation) for operation in operations]
    # Keras names the calls in a graph `id(operation)_ib-index`.
    for key in list(model._nodes):
        operation, index = key.split("_ib-")
        _, new = changes.get(int(operation), (None, None))
        if new is not None:
            model._nodes.remove(key)
            model._nodes.add(f"{id(new)}_ib-{index}")


def replace_in_sequential(
    model: keras.Sequential, changes: Mapping[int, tuple[Layer, Layer]]
) -> None:
    """Replaces layers in a Sequential model, and in the graph within it.

    Without this function a Sequential model that cannot be copied cannot be
    masked.

    Args:
        model: A Sequential model.
        changes: As in `replace_tracked`.
    """
    replace_tracked(model, changes)
    model._layers = [
        changes.get(id(layer), (None, layer))[1] for layer in model._layers
    ]
    if model._functional is not None:
        replace_in_functional(model._functional, changes)


# Variables.


class CheckpointedAsFloats(keras.Variable):
    """A bool variable that `tf.train.Checkpoint` writes and reads as float32.

    TensorFlow only reads values of the variable's present type. Without this
    class checkpoints of versions that had float masks are lost. A SavedModel,
    which is read into a plain bool variable, has bools.
    """

    def _serialize_to_tensors(self):
        written = tf.bool if _is_writing_saved_model() else tf.float32
        return {"VARIABLE_VALUE": tf.cast(self.value, written)}

    def _restore_from_tensors(self, restored_tensors):
        self.assign(restored_tensors["VARIABLE_VALUE"] != 0)
        return self.value


def _is_writing_saved_model():
    """Returns whether TensorFlow is writing a SavedModel.

    It writes the values outside its `save_context`: only the calls tell.
    """
    writer = "tensorflow.python.saved_model.save"
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") != writer:
        frame = frame.f_back
    return frame is not None


def stored_value(variable: keras.Variable) -> tf.Variable:
    """Returns the value of a variable, in the variable's precision.

    `variable.value` is cast in mixed precision, and a scope may replace it.
    Without this function kernels lose bits on the way to their gradient.
    """
    return variable._value


def assign_now(variable: keras.Variable, value) -> None:
    """Assigns a value at once, within a `StatelessScope` too.

    There `assign` only changes the scope, and is lost with it. Without this
    function a masked layer loses what it assigns while it is called.
    """
    variable._direct_assign(value)


# Optimizers.


def trained_variables(optimizer: keras.Optimizer) -> list[keras.Variable]:
    """Returns the variables that a built optimizer trains.

    Without this function a kernel's memory (momentum) cannot be found.
    """
    return optimizer._trainable_variables


def accumulated_batches(optimizer: keras.Optimizer) -> keras.Variable:
    """Returns the variable that counts the batches an optimizer has seen.

    `iterations` counts steps, each of several batches when gradients are
    accumulated. Without this function an update cannot fall on the last of
    them.
    """
    return optimizer._iterations


def drop_accumulated_gradients(optimizer: keras.Optimizer) -> None:
    """Sets the gradients that an optimizer has accumulated to zero.

    An update replaces the step that would use them. Without this function they
    leak into the next step.
    """
    optimizer._backend_reset_gradient_accumulators()


_REPLICA_SUM = "_all_reduce_sum_gradients"


def replica_sum(optimizer: keras.Optimizer, pairs: Sequence) -> list:
    """Returns gradients summed over replicas, as an optimizer sums them.

    Without this function only whole gradients can travel between replicas.

    Args:
        optimizer: The optimizer that they are for.
        pairs: Pairs of gradient and variable; a gradient may be None.
    """
    return getattr(type(optimizer), _REPLICA_SUM)(optimizer, pairs)


def given_replica_sum(optimizer: keras.Optimizer) -> Callable | None:
    """Returns what `set_replica_sum` has given an optimizer, or None."""
    return vars(optimizer).get(_REPLICA_SUM)


def set_replica_sum(optimizer: keras.Optimizer, summed: Callable | None):
    """Makes an optimizer sum gradients over replicas by another function.

    The sum comes after clipping and before weights move. Without this function
    only whole gradients can travel between replicas.

    Args:
        optimizer: The optimizer that moves the weights.
        summed: Takes and returns pairs, as `replica_sum`. None: Keras's again.
    """
    if summed is not None:
        setattr(optimizer, _REPLICA_SUM, summed)
    elif _REPLICA_SUM in vars(optimizer):
        delattr(optimizer, _REPLICA_SUM)


# TensorFlow.


def is_compiled_by_xla(graph: tf.Graph) -> bool:
    """Returns whether XLA compiles a graph, outer graphs aside.

    Without this function XLA's graphs get operations that it lacks.
    """
    context = graph._get_control_flow_context()
    return context is not None and context.IsXLAContext()


def is_in_step_of_keras() -> bool:
    """Returns whether a step of Keras (such as `predict`) is being traced.

    Without this function operations of the op library get into graphs that
    users trace, and may save or compile by XLA without that library.
    """
    graph, names = tf.compat.v1.get_default_graph(), set()
    while graph is not None:
        names.add(getattr(graph, "name", ""))
        graph = getattr(graph, "outer_graph", None)
    return bool(
        names
        & {
            "one_step_on_data",
            "one_step_on_data_distributed",
            "multi_step_on_data",
            "multi_step_on_iterator",
        }
    )


def define_functions(definition: Any) -> None:
    """Registers the functions of a graph's definition with TensorFlow.

    Importing a graph into a function that is traced does not register them, and
    the bodies of loops are such functions. Without this function recurrent
    layers cannot run beside networks.
    """
    known: Any = _context.context()
    for function in definition.library.function:
        if not known.has_function(function.signature.name):
            known.add_function_def(function)


def frozen(function: Any) -> Any:
    """Returns the graph of a concrete function with constants for variables.

    Calls within it are inlined where TensorFlow does that; loops stay. The
    public way also makes a function of the graph, and takes twice as long.
    Without this function no graph holds the weights of a model.
    """
    data = _constants._FunctionConverterDataInEager(
        func=function, lower_control_flow=False, aggressive_inlining=False
    )
    return _constants._replace_variables_by_constants(converter_data=data)[0]


def may_differentiate() -> bool:
    """Returns whether a gradient tape may record what is computed now.

    Without this function a training loop with its own tape takes longer.
    """
    return _record.could_possibly_record()


def converted_as_here(function: Callable) -> Callable:
    """Returns a function that AutoGraph converts if it converts the caller.

    Without it a custom loop has AutoGraph convert this package as well, which
    takes seconds, or an `if` of the loop cannot ask for a tensor's value.
    """
    autograph = tf.__internal__.autograph
    status = autograph.control_status_ctx()
    return autograph.tf_convert(function, status, convert_by_default=False)


def like_function(function: Callable, decorated: Callable) -> Callable:
    """Returns `decorated` with the name and arguments of `function`.

    `tf.custom_gradient` looks for arguments by a private mark of TensorFlow.
    Without this function it does not see that a gradient function takes
    `variables=`.
    """
    return tf.__internal__.decorator.make_decorator(function, decorated)


def wrap_custom_gradients(wrap: Callable[[Callable], Callable]) -> None:
    """Makes `wrap` change each function with a custom gradient when called.

    Functions decorated by `tf.custom_gradient` earlier are included. A second
    call has no effect, so a module may be reloaded. Without this function
    `keras.remat` and reversible layers call layers without their masks.

    Args:
        wrap: Takes the function and returns the one to call instead.
    """
    for name in ("_eager_mode_decorator", "_graph_mode_decorator"):
        _wrap_decorator(name, wrap)


def _wrap_decorator(name, wrap):
    decorate = getattr(_custom_gradient, name)

    def wrapping(function, args, kwargs):
        return decorate(wrap(function), args, kwargs)

    if not hasattr(decorate, "is_wrapped"):
        vars(wrapping)["is_wrapped"] = True
        setattr(_custom_gradient, name, wrapping)
