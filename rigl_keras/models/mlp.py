"""Multi-layer perceptrons."""

from collections.abc import Sequence

import keras
from keras import layers

__all__ = ["mlp"]


def mlp(
    num_classes: int = 10,
    input_shape: Sequence[int] = (28, 28, 1),
    hidden: Sequence[int] = (300, 100),
    *,
    weight_decay: float = 0.0,
    name: str = "mlp",
) -> keras.Model:
    """Returns a fully connected network with ReLU.

    The default hidden sizes are those of LeNet-300-100, which the authors of
    RigL train on MNIST (Evci et al., 2020, appendix B).

    Args:
        num_classes: Number of classes, at least 1.
        input_shape: Shape of one input, flattened first.
        hidden: Units of each hidden layer, each at least 1.
        weight_decay: Coupled L2 on kernels, as in `wide_resnet`.
        name: Name of the model.

    Returns:
        A Sequential model whose output is logits, shape (batch, num_classes).

    Raises:
        ValueError: An argument is out of range.

    Example:

    >>> mlp().count_params()
    266610
    """
    if num_classes < 1 or any(units < 1 for units in hidden):
        raise ValueError(
            "Each layer needs at least one unit. Received: "
            f"num_classes={num_classes}, hidden={tuple(hidden)}."
        )
    l2 = keras.regularizers.L2(weight_decay / 2) if weight_decay else None
    return keras.Sequential(
        [
            keras.Input(tuple(input_shape), name="input"),
            layers.Flatten(name="flatten"),
            *(
                layers.Dense(
                    units,
                    activation="relu",
                    kernel_initializer="he_normal",
                    kernel_regularizer=l2,
                    name=f"dense{i}",
                )
                for i, units in enumerate(hidden, start=1)
            ),
            layers.Dense(num_classes, kernel_regularizer=l2, name="classifier"),
        ],
        name=name,
    )
