"""Random Keras models of all layers that a network supports."""

import keras
import numpy as np
from keras import layers

ACTIVATIONS = (
    *("relu", "relu6", "elu", "selu", "sigmoid", "tanh", "softplus", "silu"),
    *("gelu", "hard_sigmoid", "hard_silu", "leaky_relu", "softmax"),
    *("exponential", "mish", "linear"),
)
_MOST_CHANNELS = 12
_LONGEST = 20  # rows or columns


class _Growing:
    """A model to which random layers are added."""

    def __init__(self, draw, x):
        self.draw, self.x = draw, x

    @property
    def image(self):
        return tuple(self.x.shape[1:])

    def pick(self, *choices):
        return choices[self.draw.integers(len(choices))]

    def is_so(self, chance=0.5):
        return self.draw.random() < chance

    def add(self, layer):
        self.x = layer(self.x)

    def size(self, most=3):
        """Returns the size of a window that fits."""
        rows, columns, _ = self.image
        return tuple(
            int(self.draw.integers(1, min(most, n) + 1))
            for n in (rows, columns)
        )

    def windows(self, size):
        """Returns strides, dilations and padding that TensorFlow allows."""
        options = {"padding": self.pick("same", "valid")}
        kind = self.pick("plain", "strides", "dilations")
        if kind == "strides":
            options["strides"] = self.pick(2, 3)
        elif kind == "dilations":
            # TensorFlow requires that a dilated window fits.
            if min(self.image[:2]) > 2 * (max(size) - 1):
                options["dilation_rate"] = 2
        return options

    def convolution(self):
        channels = self.image[2]
        groups = self.pick(1, 1, *[g for g in (2, 3) if channels % g == 0])
        filters = groups * int(
            self.draw.integers(1, _MOST_CHANNELS // groups + 1)
        )
        size = self.size()
        options = self.windows(size)
        self.add(
            layers.Conv2D(
                filters,
                size,
                groups=groups,
                use_bias=self.is_so(),
                activation=self.pick(None, "relu", "silu"),
                **options,
            )
        )

    def depthwise(self):
        # TensorFlow requires equal strides of rows and columns.
        size = self.size()
        multiplier = 2 if self.image[2] * 2 <= _MOST_CHANNELS else 1
        self.add(
            layers.DepthwiseConv2D(
                size,
                depth_multiplier=self.pick(1, multiplier),
                use_bias=self.is_so(),
                **self.windows(size),
            )
        )

    def separable(self):
        self.add(
            layers.SeparableConv2D(
                int(self.draw.integers(1, _MOST_CHANNELS)),
                self.size(),
                padding=self.pick("same", "valid"),
            )
        )

    def norm(self):
        self.add(
            layers.BatchNormalization(
                scale=self.is_so(0.8), center=self.is_so(0.8)
            )
        )

    def activation(self):
        kind = self.pick(*ACTIVATIONS)
        if kind == "softmax" and self.image[2] == 1:  # Keras would warn
            kind = "linear"
        if kind == "exponential":  # of small numbers only
            self.add(layers.Activation("tanh"))
        self.add(layers.Activation(kind))

    def other_activation(self):
        self.add(
            self.pick(
                layers.ReLU(max_value=2.0),
                layers.ReLU(negative_slope=0.3),
                layers.LeakyReLU(0.1),
                layers.ELU(0.5),
                layers.PReLU(shared_axes=[1, 2]),
                layers.Activation(_gelu_by_tanh),
            )
        )

    def pool(self):
        kind = self.pick(layers.MaxPooling2D, layers.AveragePooling2D)
        self.add(
            kind(
                self.size(),
                self.pick(1, 2),
                padding=self.pick("same", "valid"),
            )
        )

    def pad(self):
        edges = self.draw.integers(0, 3, (2, 2)).tolist()
        self.add(layers.ZeroPadding2D(edges))
        if self.is_so():
            self.convolution()

    def crop(self):
        if min(self.image[:2]) > 3:
            edges = self.draw.integers(0, 2, (2, 2)).tolist()
            self.add(layers.Cropping2D(edges))

    def upsample(self):
        if max(self.image[:2]) * 2 <= _LONGEST:
            self.add(
                layers.UpSampling2D(
                    self.pick((2, 2), (1, 2), (2, 1)),
                    interpolation=self.pick("nearest", "bilinear"),
                )
            )

    def squeeze_and_excite(self):
        channels = self.image[2]
        gate = self.x
        if self.is_so():
            gate = layers.GlobalAveragePooling2D(keepdims=True)(gate)
            gate = layers.Conv2D(2, 1, activation="relu")(gate)
            gate = layers.Conv2D(channels, 1, activation="sigmoid")(gate)
        else:
            gate = layers.GlobalMaxPooling2D()(gate)
            gate = layers.Dense(3, activation="silu")(gate)
            gate = layers.Dense(channels, activation="hard_sigmoid")(gate)
            gate = layers.Reshape((1, 1, channels))(gate)
        inputs = [self.x, gate] if self.is_so() else [gate, self.x]
        self.x = layers.Multiply()(inputs)

    def residual(self):
        before = self.x
        if self.is_so():
            self.norm()
            self.add(layers.ReLU())
        self.add(layers.Conv2D(self.image[2], 3, padding="same"))
        if self.is_so():
            self.norm()
        kind = self.pick(
            layers.Add, layers.Add, layers.Subtract, layers.Average
        )
        self.x = kind()([before, self.x])
        if self.is_so():
            self.add(layers.ReLU())

    def concatenate(self):
        if self.image[2] * 2 <= _MOST_CHANNELS:
            branch = layers.Conv2D(
                int(self.draw.integers(1, 5)), self.size(), padding="same"
            )
            values = [branch(self.x), self.x]
            self.x = layers.Concatenate()(values[:: self.pick(1, -1)])

    def dense(self):
        self.add(layers.Dense(int(self.draw.integers(1, _MOST_CHANNELS))))

    def nothing(self):
        self.add(
            self.pick(
                layers.Dropout(0.3),
                layers.SpatialDropout2D(0.3),
                layers.GaussianNoise(0.1),
            )
        )

    def rescale(self):
        self.add(layers.Rescaling(0.5, offset=self.pick(0.0, 0.25)))


@keras.saving.register_keras_serializable("tests")
def _gelu_by_tanh(x):
    return keras.activations.gelu(x, approximate=True)


_STEPS = (
    *(_Growing.convolution,) * 4,
    *(_Growing.norm,) * 2,
    *(_Growing.activation,) * 3,
    *(_Growing.residual,) * 2,
    _Growing.other_activation,
    _Growing.depthwise,
    _Growing.separable,
    _Growing.pool,
    _Growing.pad,
    _Growing.crop,
    _Growing.upsample,
    _Growing.squeeze_and_excite,
    _Growing.concatenate,
    _Growing.dense,
    _Growing.nothing,
    _Growing.rescale,
)


def random_model(seed, steps=10):
    """Returns a model with layers, weights and zeros drawn from a seed.

    Args:
        seed: The seed.
        steps: Number of layers, or small groups of them.

    Returns:
        A Functional model of images, with one or two outputs.
    """
    draw = np.random.default_rng(seed)
    rows, columns = draw.integers(5, 14, 2).tolist()
    channels = int(draw.integers(1, 5))
    images = keras.Input((rows, columns, channels), name="images")
    growing = _Growing(draw, images)
    for _ in range(steps):
        growing.pick(*_STEPS)(growing)
    outputs = {"values": growing.x}
    if growing.is_so():
        outputs = {}
    head = growing.pick("pool", "flat", "image")
    if head == "pool":
        growing.add(
            growing.pick(
                layers.GlobalAveragePooling2D(), layers.GlobalMaxPooling2D()
            )
        )
    elif head == "flat":
        growing.add(layers.Flatten())
    units = int(draw.integers(2, 7))
    growing.add(layers.Dense(units, activation=growing.pick(None, "softmax")))
    model = keras.Model(images, {**outputs, "classes": growing.x})
    draw_weights(model, draw)
    return model


def draw_weights(model, draw):
    """Sets a model's weights at random, with some zeros in kernels.

    Weights keep their scale, and variances are positive.
    """
    for variable in model.weights:
        shape, kind = variable.shape, variable.path.split("/")[-1]
        if not keras.backend.is_float_dtype(variable.dtype):
            continue
        if kind in ("gamma", "moving_variance"):
            value = draw.uniform(0.5, 1.5, shape)
        elif len(shape) > 1 and "kernel" in kind:
            by_channel = "depthwise" in variable.path and kind != (
                "pointwise_kernel"
            )
            fan = np.prod(shape[:2] if by_channel else shape[:-1])
            density = draw.choice([0.1, 0.5, 1.0])
            kept = draw.random(shape) < density
            value = draw.standard_normal(shape) * kept
            value *= 1 / np.sqrt(max(fan * density, 1))
        else:
            value = draw.normal(0, 0.3, shape)
        variable.assign(value.astype(np.float32))
