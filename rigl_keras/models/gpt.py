"""A small decoder-only transformer, for text."""

from typing import Any

import keras
from keras import layers, ops

__all__ = ["LearnedPositions", "gelu", "gpt"]

_DEVIATION = 0.02  # initial standard deviation of kernels and embeddings


@keras.saving.register_keras_serializable("rigl_keras")
class LearnedPositions(layers.Layer):
    """Adds a learned vector to each position of a sequence.

        y[t] = x[t] + positions[t]

    Radford et al., 2018, "Improving language understanding by generative
    pre-training", section 4.1.

    Input shape: (batch, length, width), both known.
    Output shape: as the input's.
    """

    def build(self, input_shape):
        self.positions = self.add_weight(
            name="positions",
            shape=tuple(input_shape[1:]),
            initializer=keras.initializers.RandomNormal(stddev=_DEVIATION),
        )

    def call(self, inputs):
        return inputs + ops.cast(self.positions, inputs.dtype)


@keras.saving.register_keras_serializable("rigl_keras")
def gelu(x):
    """Returns GELU by its tanh approximation, as in GPT-2.

    Hendrycks and Gimpel, 2016, arXiv:1606.08415, section 2. The exact GELU
    needs erfc, which ONNX lacks.
    """
    return ops.gelu(x, approximate=True)


def gpt(
    vocabulary: int = 97,
    context: int = 256,
    layers: int = 12,
    width: int = 512,
    heads: int = 8,
    dropout: float = 0.0,
    *,
    name: str = "gpt",
) -> keras.Model:
    """Returns a decoder-only transformer that predicts the next symbol.

    Embeddings of symbols and of positions are summed; then blocks of

        x = x + attention(norm(x))      causal, `heads` heads
        x = x + dense(gelu(dense(norm(x))))      4 x width units between

    then a last layer norm, and a dense layer to the logits of the next symbol.
    The norms come first, as in GPT-2 (Radford et al., 2019, section 2.3).
    Kernels and embeddings start as N(0, 0.02^2), biases as 0. The last layer
    does not share the embeddings: its kernel is masked, they are not. With
    characters as symbols, this adds 0.1 % of parameters.

    The default has 38 million parameters, 37.7 million of them in the
    projections of attention and the dense layers, which `sparsify` masks.

    Args:
        vocabulary: Number of symbols, at least 2. Inputs are integers in
            [0, vocabulary).
        context: Length of the sequences, at least 1.
        layers: Number of blocks, at least 1.
        width: Length of the vectors between blocks, a multiple of `heads`.
        heads: Heads of attention, at least 1.
        dropout: Dropout rate of embeddings, of attention and of the outputs of
            blocks, in [0, 1).
        name: Name of the model.

    Returns:
        A Functional model from integers, shape (batch, context), to logits,
        shape (batch, context, vocabulary). The logits at a position depend on
        the symbols up to it, and predict the next one.

    Raises:
        ValueError: An argument is out of range.

    Example:

    >>> gpt(vocabulary=97, context=256).count_params()
    38060129
    """
    for argument, value, least in (
        ("vocabulary", vocabulary, 2),
        ("context", context, 1),
        ("layers", layers, 1),
        ("width", width, 1),
        ("heads", heads, 1),
    ):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < least:
            raise ValueError(
                f"{argument} must be an int of at least {least}. Received: "
                f"{argument}={value!r}."
            )
    if width % heads:
        raise ValueError(
            "width must be a multiple of heads, which share it. Received: "
            f"width={width}, heads={heads}."
        )
    if not 0 <= dropout < 1:
        raise ValueError(
            f"dropout must be in [0, 1). Received: dropout={dropout!r}."
        )
    tokens = keras.Input((context,), dtype="int32", name="tokens")
    x = _embedding(vocabulary, width)(tokens)
    x = LearnedPositions(name="positions")(x)
    x = _dropped(x, dropout, "dropout")
    for i in range(layers):
        x = _block(x, width, heads, dropout, f"block{i}")
    x = _norm("norm")(x)
    logits = _dense(vocabulary, None, "head")(x)
    return keras.Model(tokens, logits, name=name)


def _block(x, width, heads, dropout, name):
    y = _norm(f"{name}_norm1")(x)
    # Any: Keras does not annotate what may be None.
    attention: Any = layers.MultiHeadAttention(
        heads,
        width // heads,
        dropout=dropout,
        kernel_initializer=_normal(),
        name=f"{name}_attention",
    )
    y = attention(y, y, use_causal_mask=True)
    y = _dropped(y, dropout, f"{name}_dropout1")
    x = layers.Add(name=f"{name}_add1")([x, y])
    y = _norm(f"{name}_norm2")(x)
    y = _dense(4 * width, gelu, f"{name}_expand")(y)
    y = _dense(width, None, f"{name}_contract")(y)
    y = _dropped(y, dropout, f"{name}_dropout2")
    return layers.Add(name=f"{name}_add2")([x, y])


def _embedding(vocabulary, width):
    return layers.Embedding(
        vocabulary, width, embeddings_initializer=_normal(), name="embedding"
    )


def _dense(units, activation, name):
    return layers.Dense(
        units, activation=activation, kernel_initializer=_normal(), name=name
    )


def _norm(name):
    return layers.LayerNormalization(epsilon=1e-5, name=name)


def _dropped(x, rate, name):
    return layers.Dropout(rate, name=name)(x) if rate else x


def _normal() -> Any:
    # A new one for each kernel: an initializer repeats its numbers.
    return keras.initializers.RandomNormal(stddev=_DEVIATION)
