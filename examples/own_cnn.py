# %% [markdown]
# # Your own CNN, sparse, in five minutes
#
# **Description:** Train a small convolutional network with a tenth of its
# weights, and compare it with the dense one.
#
# RigL starts from random masks. Every so many steps it drops the smallest
# weights and grows as many of the connections whose gradient is largest. The
# number of weights, and what a step costs, stay the same all the way.

# %% [markdown]
# ## Setup

# %%
import keras
import matplotlib.pyplot as plt
import numpy as np

import rigl_keras

DATA = "cifar10"  # or "digits", which is smaller and needs no download
IMAGES = 10_000  # to train on
EPOCHS = 6
DENSITY = 0.1
FIGURE = "own_cnn.png"

keras.utils.set_random_seed(0)

# %% [markdown]
# ## Images
#
# CIFAR-10 comes from TensorFlow Datasets where it is prepared, and else from
# Keras, which downloads it.


# %%
def load(name):
    """Returns training and test data, images in [0, 1]."""
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, labels = digits.images[..., None] / 16, digits.target
        return (images[300:], labels[300:]), (images[:300], labels[:300])
    try:
        import tensorflow_datasets as tfds

        parts = tfds.load(
            name,
            split=["train", "test"],
            batch_size=-1,
            as_supervised=True,
            download=False,
        )
        train, test = tfds.as_numpy(parts)
    except (ImportError, AssertionError):  # not installed, not prepared
        train, test = getattr(keras.datasets, name).load_data()
    return [(x.astype("float32") / 255, y.ravel()) for x, y in (train, test)]


(train_x, train_y), test = load(DATA)
train_x, train_y = train_x[:IMAGES], train_y[:IMAGES]
print(f"{len(train_x):,} images of {train_x.shape[1:]}")

# %% [markdown]
# ## A model
#
# Plain Keras. Nothing in it knows of sparsity.


# %%
def make_model():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input(train_x.shape[1:]),
            layers.Conv2D(32, 3, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.Conv2D(64, 3, strides=2, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.Conv2D(128, 3, strides=2, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10),
        ]
    )


# %% [markdown]
# ## Sparse, with one line
#
# `sparsify` draws a mask for each kernel. Small kernels stay denser
# (Erdős-Rényi-Kernel): see the column of densities.

# %%
sparse_model = rigl_keras.sparsify(make_model(), density=DENSITY)
print(rigl_keras.masked_layers(sparse_model))


# %% [markdown]
# ## Training
#
# `RigL` is a callback. Without one, the masks would stay as they were drawn.


# %%
def train(model, *callbacks):
    model.compile(
        keras.optimizers.Adam(2e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(
        train_x,
        train_y,
        batch_size=128,
        epochs=EPOCHS,
        validation_data=test,
        callbacks=callbacks,
        verbose=2,
    )
    return history.history["val_accuracy"]


steps = EPOCHS * -(-len(train_x) // 128)
rigl = rigl_keras.RigL(frequency=max(2, steps // 40))
curves = {
    f"RigL, density {DENSITY}": train(sparse_model, rigl),
    "dense": train(make_model()),
}

# %% [markdown]
# ## What it costs
#
# `count` knows each layer's parameters and FLOPs.

# %%
cost = rigl_keras.count(sparse_model)
print(cost)

# %% [markdown]
# ## What it learned

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="tight")
for (name, curve), style in zip(curves.items(), ("-o", "--^"), strict=True):
    epochs = np.arange(1, len(curve) + 1)
    left.plot(epochs, 100 * np.array(curve), style, label=name)
left.set(title="Test accuracy [%]", xlabel="epoch")
left.grid(alpha=0.3)
left.legend(frameon=False)
kept = {
    "parameters": 100 * cost.nonzeros / cost.parameters,
    "inference FLOPs": 100 * cost.inference_flops / cost.dense_inference_flops,
}
bars = right.barh(list(kept), list(kept.values()), height=0.5)
right.bar_label(bars, fmt="%.1f %%", padding=4)
right.set(title="Of the dense model", xlim=(0, 100), xlabel="%")
figure.savefig(FIGURE, dpi=130)

# %% [markdown]
# ## Keep it
#
# Masks are saved with the model. `rigl_keras.export(model, folder)` writes one
# to serve: see `serve_without_tensorflow.py`.

# %%
sparse_model.save("own_cnn.keras")
