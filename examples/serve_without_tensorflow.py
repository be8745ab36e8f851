# %% [markdown]
# # Prune a network, and serve it without TensorFlow
#
# **Description:** Prune a dense network while it trains, export it, and call it
# from a process that has NumPy and no TensorFlow.
#
# Gradual magnitude pruning starts dense and removes the smallest weights along
# a ramp. The export is a network and a library of about a megabyte, and its
# products leave out what the masks remove.

# %% [markdown]
# ## Setup

# %%
import subprocess
import sys
import time
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import rigl_keras

EPOCHS = 15
WIDTH = 64  # channels
DENSITY = 0.05
SECONDS = 1.0  # to time each side
FIGURE = "serve_without_tensorflow.png"

keras.utils.set_random_seed(0)
digits = load_digits()
images = digits.images[..., None].astype("float32") / 16
labels = digits.target

# %% [markdown]
# ## Prune
#
# `sparsify(model, 1.0)` masks nothing yet. `MagnitudePruning` lowers density
# along a ramp: here from a fifth to two thirds of the run. What remains is
# trained on.

# %%
layers = keras.layers
model = keras.Sequential(
    [
        keras.Input((8, 8, 1), name="image"),
        layers.Conv2D(WIDTH, 3, padding="same", use_bias=False),
        layers.BatchNormalization(momentum=0.9),
        layers.ReLU(),
        layers.Conv2D(WIDTH, 3, padding="same", use_bias=False),
        layers.BatchNormalization(momentum=0.9),
        layers.ReLU(),
        layers.Conv2D(2 * WIDTH, 3, strides=2, padding="same"),
        layers.ReLU(),
        layers.Flatten(),
        layers.Dense(10, name="logits"),
    ]
)
model = rigl_keras.sparsify(model, 1.0)
model.compile(
    keras.optimizers.Adam(2e-3),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
steps = EPOCHS * -(-len(images) * 3 // 4 // 32)
ramp = rigl_keras.SparsityRamp(
    final_density=DENSITY,
    begin_step=steps // 5,
    end_step=2 * steps // 3,
    frequency=10,
)
history = model.fit(
    images,
    labels,
    epochs=EPOCHS,
    validation_split=0.25,
    callbacks=[rigl_keras.MagnitudePruning(ramp)],
    verbose=2,
).history

# %% [markdown]
# ## Export
#
# Batch norms become part of the convolutions, and every file is loaded back and
# compared with the model before it takes its place.

# %%
report = rigl_keras.export(
    model,
    "native/",
    format="native",
    remove_dead_units=True,
    batch_sizes=(1, 32),
    overwrite=True,
)
print(report)
print(sorted(path.name for path in Path("native").iterdir()))

# %% [markdown]
# ## Serve
#
# Another process, in which TensorFlow, Keras and this library cannot be
# imported. `native/network.py` is all the Python that it needs. C may call the
# same library: `native/README.txt` shows how.

# %%
SERVE = """
import sys
for name in ("tensorflow", "keras", "rigl_keras"):
    sys.modules[name] = None  # ruled out

import time

import numpy as np
from network import Network

images = np.load("images.npy")
with Network("native/network.rigl", threads=1) as network:
    (name,) = (value.name for value in network.outputs)
    np.save("logits.npy", network(images)[name])
    one, times = images[:1], []
    end = time.perf_counter() + float(sys.argv[1])
    while time.perf_counter() < end or not times:
        start = time.perf_counter()
        network(one)
        times.append(time.perf_counter() - start)
print(1e6 * np.median(times))
"""
np.save("images.npy", images)
served = subprocess.run(
    [sys.executable, "-c", SERVE, str(SECONDS)],
    env={"PYTHONPATH": "native"},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
)
sparse_us = float(served.stdout)
difference = abs(np.load("logits.npy") - model.predict(images, verbose=0)).max()
print(f"Logits differ from Keras's by at most {difference:.1e}.")

# %% [markdown]
# ## What was gained
#
# The dense side is the same network as a function of TensorFlow. For one so
# small, calls are much of TensorFlow's time; `docs/speed.md` and
# `docs/serving.md` compare larger ones, and other engines.

# %%
dense = tf.function(rigl_keras.strip(model))
one, times = tf.constant(images[:1]), []
dense(one)
end = time.perf_counter() + SECONDS
while time.perf_counter() < end or not times:
    start = time.perf_counter()
    dense(one)
    times.append(time.perf_counter() - start)
dense_us = 1e6 * np.median(times)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="tight")
epochs = np.arange(1, EPOCHS + 1)
left.plot(epochs, 100 * np.array(history["val_accuracy"]), "-o")
left.set(title="Validation accuracy [%]", xlabel="epoch", xticks=epochs[1::2])
left.grid(alpha=0.3)
density = left.twinx()
density.plot(epochs, history["density"], "--", color="gray")
density.set(ylabel="density (dashed)", ylim=(0, 1.05))
names = ["TensorFlow, dense", "native, sparse"]
bars = right.barh(names, [dense_us, sparse_us], height=0.5)
right.bar_label(bars, fmt="%.0f µs", padding=4)
right.set(title="One image", xlabel="µs", xlim=(0, 1.25 * dense_us))
figure.savefig(FIGURE, dpi=130)
