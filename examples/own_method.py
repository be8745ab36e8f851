# %% [markdown]
# # A method of your own
#
# **Description:** Write a method that moves connections in ten lines, and
# compare it with RigL and SET.
#
# A method says two things: what an active connection is worth (the least are
# dropped), and what an inactive one promises (the most are grown). `MaskUpdate`
# does the rest: when masks change, how many connections move, what the
# optimizer forgets, logs, resuming.

# %% [markdown]
# ## Setup

# %%
import dataclasses

import keras
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import rigl_keras

SEEDS = (0, 1, 2)
EPOCHS = 12
DENSITY = 0.02
FIGURE = "own_method.png"

digits = load_digits()
images, labels = digits.images.reshape(-1, 64) / 16, digits.target

# %% [markdown]
# ## The method
#
# RigL drops the smallest |w|. Here the loss has a say: |w dL/dw| is what, to
# first order, the loss changes by if the weight goes. `gradient` is that of the
# current batch, of every entry of the kernel.
#
# Arguments are fields of the class. `sharpness` is one more than RigL has: at 0
# weights are dropped by their size alone.


# %%
@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Sensitivity(rigl_keras.MaskUpdate):
    """Drops by |w| |dL/dw|^sharpness, and grows by |dL/dw|."""

    sharpness: float = 1.0

    def drop_scores(self, layer, gradient, step):
        return abs(layer.kernel.value) * abs(gradient) ** self.sharpness

    def grow_scores(self, layer, gradient, step):
        return abs(gradient)


# %% [markdown]
# With `sharpness=0` it is RigL. A method that grows without gradients of
# inactive entries, as SET does, says `dense_gradients = "never"` in its class,
# and costs no dense product.

# %% [markdown]
# ## A comparison
#
# The same network, masks and batches for each, over some seeds.


# %%
def accuracy(method, seed):
    """Returns the validation accuracy of each epoch."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(300, activation="relu", name="first"),
            keras.layers.Dense(100, activation="relu", name="second"),
            keras.layers.Dense(10, name="logits"),
        ]
    )
    model = rigl_keras.sparsify(model, DENSITY, seed=seed)
    model.compile(
        keras.optimizers.Adam(3e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(
        images,
        labels,
        epochs=EPOCHS,
        validation_split=0.25,
        callbacks=[] if method is None else [method],
        verbose=0,
    )
    return history.history["val_accuracy"]


METHODS = {
    "static masks": lambda: None,
    "SET": lambda: rigl_keras.SET(frequency=20),
    "RigL": lambda: rigl_keras.RigL(frequency=20),
    "Sensitivity": lambda: Sensitivity(frequency=20),
}
curves = {
    name: 100 * np.array([accuracy(make(), seed) for seed in SEEDS])
    for name, make in METHODS.items()
}
for name, runs in curves.items():
    last = runs[:, -1]
    print(f"{name:14} {last.mean():5.1f} % +- {last.std():.1f}")

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="tight")
styles = (":", "--", "-", "-o")
for (name, runs), style in zip(curves.items(), styles, strict=True):
    epochs = np.arange(1, runs.shape[1] + 1)
    axes.plot(epochs, runs.mean(0), style, label=name)
axes.set(
    title=f"Validation accuracy [%], density {DENSITY}, {len(SEEDS)} seeds",
    xlabel="epoch",
)
axes.grid(alpha=0.3)
axes.legend(frameon=False)
figure.savefig(FIGURE, dpi=130)

# %% [markdown]
# ## Where to go from here
#
# `docs/methods.md` lists what else a method may say: other drop fractions by
# layer (`layer_fractions`), what to do before connections go (`before_drop`),
# dense masters (`StoredWeights`). To add one to the library, put it into the
# tests' table of methods, and every contract is tested on it.
