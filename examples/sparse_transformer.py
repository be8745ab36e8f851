# %% [markdown]
# # A sparse transformer
#
# **Description:** Train a small language model, twice as wide and a quarter as
# dense, and compare it with a dense one of as many weights.
#
# Attention and dense layers of a transformer are matrices, and matrices can be
# sparse. For the same number of weights a sparse network may be wider. This one
# predicts the next character of Python's own documentation, which every Python
# ships: nothing is downloaded.

# %% [markdown]
# ## Setup

# %%
from pydoc_data import topics

import keras
import matplotlib.pyplot as plt
import numpy as np

import rigl_keras

CONTEXT = 64  # characters that the network sees
WIDTH = 64  # of the dense network; the sparse one is twice as wide
BLOCKS = 3
STEPS = 600
BATCH = 32
EVALUATE_EVERY = 50  # steps
FIGURE = "sparse_transformer.png"

# %% [markdown]
# ## Text

# %%
text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
alphabet = sorted({c for c in text if c.isascii()})
code = {character: number for number, character in enumerate(alphabet)}
symbols = np.array([code[c] for c in text if c in code], "int32")
train, held_out = symbols[:-50_000], symbols[-50_000:]
print(f"{len(symbols):,} characters, {len(alphabet)} different ones")


def windows(source, count, seed):
    """Returns so many pieces of a text, and what follows each character."""
    starts = np.random.default_rng(seed).integers(
        0, len(source) - CONTEXT, count
    )
    pieces = source[starts[:, None] + np.arange(CONTEXT + 1)]
    return pieces[:, :-1], pieces[:, 1:]


# %% [markdown]
# ## A model
#
# A decoder of plain Keras layers. `rigl_keras.models.gpt` is one, too.


# %%
@keras.saving.register_keras_serializable("sparse_transformer")
class Positions(keras.layers.Layer):
    """Adds a learned vector to each position."""

    def build(self, input_shape):
        self.vectors = self.add_weight(
            name="vectors", shape=input_shape[1:], initializer="random_normal"
        )

    def call(self, inputs):
        return inputs + self.vectors


def make_model(width):
    layers = keras.layers
    inputs = keras.Input((CONTEXT,), dtype="int32")
    x = Positions()(layers.Embedding(len(alphabet), width)(inputs))
    for number in range(BLOCKS):
        normal = layers.LayerNormalization()(x)
        attention = layers.MultiHeadAttention(
            4, width // 4, name=f"attention{number}"
        )
        x = x + attention(normal, normal, use_causal_mask=True)
        hidden = layers.LayerNormalization()(x)
        hidden = layers.Dense(
            4 * width, activation="gelu", name=f"wide{number}"
        )(hidden)
        x = x + layers.Dense(width, name=f"narrow{number}")(hidden)
    x = layers.LayerNormalization()(x)
    return keras.Model(inputs, layers.Dense(len(alphabet), name="head")(x))


# %% [markdown]
# ## Training
#
# `sparsify` masks the four projections of attention and the dense layers.
# Embeddings, positions, norms and biases stay dense. Density a quarter, width
# twice: as many weights.


# %%
class Losses(keras.callbacks.Callback):
    """Measures the loss on held-out text, in bits per character."""

    def __init__(self):
        super().__init__()
        self.pieces = windows(held_out, 128, seed=0)
        self.steps, self.bits = [], []

    def on_train_batch_end(self, batch, logs=None):
        step = batch + 1
        if step % EVALUATE_EVERY == 0:
            x, y = self.pieces
            logits = self.model.predict(x, verbose=0)
            nats = keras.losses.sparse_categorical_crossentropy(
                y, logits, from_logits=True
            )
            self.steps.append(step)
            self.bits.append(float(np.mean(nats) / np.log(2)))
            print(f"step {step:5}: {self.bits[-1]:.3f} bits per character")


def trained(model, *callbacks):
    losses = Losses()
    model.compile(
        keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(
                0.0, STEPS, warmup_target=3e-3, warmup_steps=STEPS // 10
            ),
            clipnorm=1.0,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    pieces = windows(train, STEPS * BATCH, seed=1)
    model.fit(
        *pieces,
        batch_size=BATCH,
        callbacks=[losses, *callbacks],
        verbose=0,
    )
    return losses


keras.utils.set_random_seed(0)
dense = make_model(WIDTH)
curves = {f"dense, width {WIDTH}": trained(dense)}

keras.utils.set_random_seed(0)
sparse = rigl_keras.sparsify(make_model(2 * WIDTH), density=0.25)
print(rigl_keras.masked_layers(sparse))
rigl = rigl_keras.RigL(frequency=max(2, STEPS // 30))
curves[f"RigL, width {2 * WIDTH}, density 0.25"] = trained(sparse, rigl)

for name, model in (("dense", dense), ("sparse", sparse)):
    cost = rigl_keras.count(model)
    print(f"{name:7}{cost.nonzeros:10,} weights")

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="tight")
for (name, losses), style in zip(curves.items(), ("--", "-o"), strict=True):
    axes.plot(losses.steps, losses.bits, style, label=name, markersize=3)
axes.set(title="Bits per character, held-out text", xlabel="step")
axes.grid(alpha=0.3)
axes.legend(frameon=False)
figure.savefig(FIGURE, dpi=130)

# %% [markdown]
# ## What it writes


# %%
def continued(model, start, count=200, seed=0):
    """Returns a text and what the model makes of it, character by character."""
    draw = np.random.default_rng(seed)
    found = [code[c] for c in start]
    for _ in range(count):
        seen = found[-CONTEXT:]
        padded = np.zeros((1, CONTEXT), "int32")
        padded[0, : len(seen)] = seen
        logits = model(padded)[0, len(seen) - 1].numpy() / 0.7
        chances = np.exp(logits - logits.max())
        found.append(draw.choice(len(chances), p=chances / chances.sum()))
    return "".join(alphabet[number] for number in found)


print(continued(sparse, "The statement "))
