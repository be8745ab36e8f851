"""Computes and trains a GPT of `models.gpt` with PyTorch, for comparison.

PyTorch is not a dependency. It is imported when a network is made.
"""

# PyTorch may be missing where types are checked, too.
# pyright: reportMissingImports=false

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers

from rigl_keras.experiments.benchmarks import torch_network

__all__ = ["torch_gpt", "torch_gpt_step"]


def torch_gpt(model: keras.Model) -> Any:
    """Returns a `torch.nn.Module` that computes the same as a GPT.

    It is written as usual in PyTorch: one product for queries, keys and
    values, and `scaled_dot_product_attention`.

    Args:
        model: From `models.gpt`, without dropout and without masks.

    Returns:
        A module from integers, shape (batch, context), to logits. Its
        parameters are copies of the model's weights.

    Raises:
        ImportError: PyTorch is missing.
        ValueError: The model has dropout.
    """
    if not torch_network.is_installed():
        raise ImportError(f"PyTorch is not installed: {torch_network.INSTALL}")
    blocks = []
    for layer in model.layers:
        if isinstance(layer, layers.Dropout) or getattr(layer, "dropout", 0):
            raise ValueError(
                "torch_gpt takes a GPT of dropout=0. Received a model with the "
                f"layer {layer.name!r}."
            )
        if isinstance(layer, layers.MultiHeadAttention):
            blocks.append(layer.name.removesuffix("_attention"))
    return _network(model, blocks)


def _network(model, names):
    """Returns a GPT of the blocks of these names."""
    import torch
    from torch import nn

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            (embeddings,), (positions,) = (
                _weights(model, "embedding"),
                _weights(model, "positions"),
            )
            self.embedding = nn.Embedding.from_pretrained(
                torch.tensor(embeddings), freeze=False
            )
            self.positions = nn.Parameter(torch.tensor(positions))
            self.blocks = nn.ModuleList(_block(model, name) for name in names)
            self.norm = _norm(model, "norm")
            self.head = _linear(*_weights(model, "head"))

        def forward(self, tokens):
            x = self.embedding(tokens) + self.positions
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    return Network()


def _block(model, name):
    """Returns a block: attention, then two layers, each added to its input."""
    from torch import nn
    from torch.nn import functional

    attention = model.get_layer(f"{name}_attention")
    heads, out = attention.num_heads, attention.output_dense
    width = attention.query_dense.kernel.shape[0]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.joint = _joint(attention, width)
            self.out = _linear(
                np.reshape(out.kernel, (-1, width)), np.array(out.bias)
            )
            self.norm1 = _norm(model, f"{name}_norm1")
            self.norm2 = _norm(model, f"{name}_norm2")
            self.expand = _linear(*_weights(model, f"{name}_expand"))
            self.contract = _linear(*_weights(model, f"{name}_contract"))

        def forward(self, x):
            batch, length, _ = x.shape
            joint = self.joint(self.norm1(x))
            query, key, value = (
                part.view(batch, length, heads, -1).transpose(1, 2)
                for part in joint.split(width, dim=2)
            )
            y = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True
            )
            x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
            y = functional.gelu(self.expand(self.norm2(x)), approximate="tanh")
            return x + self.contract(y)

    return Block()


def _joint(attention, width):
    """Returns one layer that computes queries, keys and values."""
    parts = [
        attention.query_dense,
        attention.key_dense,
        attention.value_dense,
    ]
    return _linear(
        np.concatenate(
            [np.reshape(part.kernel, (width, -1)) for part in parts], axis=1
        ),
        np.concatenate([np.reshape(part.bias, -1) for part in parts]),
    )


def _linear(kernel, bias):
    import torch

    made = torch.nn.Linear(*kernel.shape)
    with torch.no_grad():
        made.weight.copy_(torch.tensor(kernel.T))
        made.bias.copy_(torch.tensor(bias))
    return made


def _norm(model, name):
    import torch

    gamma, beta = _weights(model, name)
    made = torch.nn.LayerNorm(len(gamma), eps=model.get_layer(name).epsilon)
    with torch.no_grad():
        made.weight.copy_(torch.tensor(gamma))
        made.bias.copy_(torch.tensor(beta))
    return made


def _weights(model, name):
    return [np.array(v) for v in model.get_layer(name).weights]


def torch_gpt_step(
    model: keras.Model, *, learning_rate: float = 1e-3, clip_norm: float = 1.0
) -> Callable[[np.ndarray, np.ndarray], float]:
    """Returns a training step of a GPT, written as usual in PyTorch.

    It has a forward and a backward pass, clipping by the global norm, and
    PyTorch's fused AdamW.

    Args:
        model: As in `torch_gpt`.
        learning_rate, clip_norm: As in `optimizers.adamw`.

    Returns:
        A function from characters and the characters that follow each, int
        arrays of shape (batch, context), to the loss before the step.

    Raises:
        ImportError, ValueError: As in `torch_gpt`.
    """
    network = torch_gpt(model)
    import torch

    decayed, others = [], []
    for name, parameter in network.named_parameters():
        kernel = name.endswith("weight") and parameter.ndim == 2
        kernel = kernel and not name.startswith("embedding")
        (decayed if kernel else others).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": 0.1},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=(0.9, 0.99),
        fused=True,
    )

    def step(tokens, following):
        logits = network(torch.from_numpy(tokens))
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(following).long().flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        optimizer.step()
        return loss.item()

    return step
