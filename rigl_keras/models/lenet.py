"""LeNet-5."""

import keras
from keras import layers

__all__ = ["lenet5"]


def lenet5(
    num_classes: int = 10,
    input_shape: tuple[int, int, int] = (28, 28, 1),
    *,
    weight_decay: float = 0.0,
    name: str = "lenet5",
) -> keras.Model:
    """Returns LeNet-5 with ReLU and max pooling.

    Convolution 5x5 with 6 channels (`same`), pool, convolution 5x5 with 16,
    pool, dense 120, 84 and the classes. LeCun et al., 1998, section II.B. ReLU
    and max pooling replace tanh and trained subsampling, as is usual today.

    Args:
        num_classes: Number of classes, at least 1.
        input_shape: Height, width and channels, at least 12 x 12.
        weight_decay: Coupled L2 on kernels, as in `wide_resnet`.
        name: Name of the model.

    Returns:
        A Sequential model whose output is logits, shape (batch, num_classes).

    Raises:
        ValueError: An argument is out of range.

    Example:

    >>> lenet5().count_params()
    61706
    """
    if len(input_shape) != 3 or min(input_shape[:2]) < 12:
        raise ValueError(
            "input_shape must be (height, width, channels) of at least 12 x "
            f"12. Received: input_shape={tuple(input_shape)}."
        )
    if num_classes < 1:
        raise ValueError(
            f"num_classes must be at least 1. Received: {num_classes}."
        )
    l2 = keras.regularizers.L2(weight_decay / 2) if weight_decay else None
    kernel = {"kernel_initializer": "he_normal", "kernel_regularizer": l2}
    return keras.Sequential(
        [
            keras.Input(input_shape, name="image"),
            layers.Conv2D(
                6, 5, padding="same", activation="relu", name="conv1", **kernel
            ),
            layers.MaxPooling2D(name="pool1"),
            layers.Conv2D(16, 5, activation="relu", name="conv2", **kernel),
            layers.MaxPooling2D(name="pool2"),
            layers.Flatten(name="flatten"),
            layers.Dense(120, activation="relu", name="dense1", **kernel),
            layers.Dense(84, activation="relu", name="dense2", **kernel),
            layers.Dense(num_classes, name="classifier", kernel_regularizer=l2),
        ],
        name=name,
    )
