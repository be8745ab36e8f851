# %% [markdown]
# # Sparse transfer learning
#
# **Description:** Take a network of keras.applications that was trained on
# ImageNet, fine-tune it on other images, and prune it on the way.
#
# What has been trained already has weights worth keeping. So this starts dense,
# and gradual magnitude pruning removes the smallest weights while the network
# is fine-tuned. RigL, which starts from random masks, is for training from
# scratch.

# %% [markdown]
# ## Setup

# %%
import keras
import matplotlib.pyplot as plt
import numpy as np

import rigl_keras

DATA = "cifar10"  # or "digits", which is smaller and needs no download
WEIGHTS = "imagenet"  # downloaded by Keras; None: random ones
SIZE = 96  # of the images, in pixels
IMAGES = 10_000  # to train on
HEAD_EPOCHS = 2
EPOCHS = 8
DENSITY = 0.2
FIGURE = "transfer_learning.png"

keras.utils.set_random_seed(0)

# %% [markdown]
# ## Images
#
# CIFAR-10 comes from TensorFlow Datasets where it is prepared, and else from
# Keras, which downloads it.


# %%
def load(name):
    """Returns training and test data, images of three channels, 0 to 255."""
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.repeat(digits.images[..., None] * (255 / 16), 3, axis=-1)
        labels = digits.target
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
    return [(x.astype("float32"), y.ravel()) for x, y in (train, test)]


(train_x, train_y), (test_x, test_y) = load(DATA)
train_x, train_y = train_x[:IMAGES], train_y[:IMAGES]
test_x, test_y = test_x[: IMAGES // 5], test_y[: IMAGES // 5]

# %% [markdown]
# ## A model
#
# The backbone, and a new head. Images are enlarged to what it has seen.

# %%
backbone = keras.applications.MobileNet(
    input_shape=(SIZE, SIZE, 3),
    alpha=0.25,
    include_top=False,
    weights=WEIGHTS,
    pooling="avg",
)
inputs = keras.Input(train_x.shape[1:])
x = keras.layers.Resizing(SIZE, SIZE)(inputs)
x = keras.layers.Rescaling(1 / 127.5, offset=-1)(x)
outputs = keras.layers.Dense(10, name="head")(backbone(x))
model = keras.Model(inputs, outputs)


def fit(model, epochs, learning_rate, *callbacks):
    model.compile(
        keras.optimizers.Adam(learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(
        train_x,
        train_y,
        batch_size=64,
        epochs=epochs,
        validation_data=(test_x, test_y),
        callbacks=callbacks,
        verbose=2,
    )
    return history.history


# %% [markdown]
# ## First the head
#
# The backbone is frozen, or the head's first, random gradients would spoil it.

# %%
backbone.trainable = False
head = fit(model, HEAD_EPOCHS, 3e-3)
backbone.trainable = True

# %% [markdown]
# ## Then all of it, pruned on the way
#
# `sparsify(model, 1.0)` masks nothing yet, and finds the layers within the
# backbone. Depthwise kernels, a hundredth of the weights, and the head stay as
# they are: `layers` says which are masked.

# %%
wide = [
    layer
    for layer in backbone.layers
    if isinstance(layer, keras.layers.Conv2D)
    and not isinstance(layer, keras.layers.DepthwiseConv2D)
]
sparse = rigl_keras.sparsify(model, 1.0, layers=wide)
steps = EPOCHS * -(-len(train_x) // 64)
ramp = rigl_keras.SparsityRamp(
    final_density=DENSITY,
    begin_step=steps // 10,
    end_step=2 * steps // 3,
    frequency=max(1, steps // 50),
)
history = fit(sparse, EPOCHS, 1e-3, rigl_keras.MagnitudePruning(ramp))

# %%
cost = rigl_keras.count(sparse)
print(f"{cost.nonzeros:,} of {cost.parameters:,} parameters")
print(f"{cost.inference_flops / cost.dense_inference_flops:.2f} of the FLOPs")

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="tight")
accuracy = 100 * np.array(head["val_accuracy"] + history["val_accuracy"])
epochs = np.arange(1, len(accuracy) + 1)
axes.plot(epochs, accuracy, "-o")
axes.axvspan(0.5, HEAD_EPOCHS + 0.5, alpha=0.1, label="the head alone")
axes.set(title="Test accuracy [%]", xlabel="epoch", xlim=(0.5, None))
axes.legend(frameon=False, loc="lower right")
axes.grid(alpha=0.3)
density = axes.twinx()
kept = [1.0] * HEAD_EPOCHS + history["density"]
density.plot(epochs, kept, "--", color="gray")
density.set(ylabel="density of masked weights (dashed)", ylim=(0, 1.05))
figure.savefig(FIGURE, dpi=130)

# %% [markdown]
# ## Serve it
#
# `rigl_keras.export(sparse, "exported/", format="native")` writes a file that
# runs without TensorFlow: see `serve_without_tensorflow.py`.

# %%
sparse.save("transfer_learning.keras")
