"""How models are trained, and which kinds of models can be."""

import keras

from support.kinds import KINDS

BATCH = 4


def sgd(**options):
    return keras.optimizers.SGD(0.01, momentum=0.9, **options)


# How a model is trained: what is given to whom.
SETUPS = {
    "float32": {},
    "mixed_float16": {"policy": "mixed_float16"},
    "mixed_bfloat16": {"policy": "mixed_bfloat16"},
    "jit_compile": {"compile": {"jit_compile": True}},
    "steps_per_execution": {"compile": {"steps_per_execution": 3}},
    "run_eagerly": {"compile": {"run_eagerly": True}},
    "Adam": {"optimizer": lambda: keras.optimizers.Adam(0.01)},
    "gradient accumulation": {
        "optimizer": lambda: sgd(gradient_accumulation_steps=2),
        "batch_size": BATCH // 2,
    },
    "clipnorm": {"optimizer": lambda: sgd(clipnorm=0.1)},
    "EMA": {"optimizer": lambda: sgd(use_ema=True)},
    "sample_weight": {"weighted": True},
    "growth by several batches": {"method": {"gradient_batches": 2}},
    "own loop": {"by_hand": True},
}


# What is not claimed, and why.
UNSUPPORTED = {}


def support_table() -> str:
    """Returns the README's table: kinds of models by set-ups."""
    lines = [
        "| | " + " | ".join(SETUPS) + " |",
        "|---" * (len(SETUPS) + 1) + "|",
    ]
    for kind in KINDS:
        cells = ["–" if (kind, s) in UNSUPPORTED else "✓" for s in SETUPS]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
