"""Training set-ups, and the kinds of models that each supports."""

import keras

from support.kinds import KINDS

BATCH = 4


def sgd(**options):
    return keras.optimizers.SGD(0.01, momentum=0.9, **options)


def adam(**options):
    return keras.optimizers.Adam(0.01, **options)


# The set-ups: arguments for the functions that train a model.
SETUPS = {
    "float32": {},
    "mixed_float16": {"policy": "mixed_float16"},
    "mixed_bfloat16": {"policy": "mixed_bfloat16"},
    "jit_compile": {"compile": {"jit_compile": True}},
    "steps_per_execution": {"compile": {"steps_per_execution": 3}},
    "run_eagerly": {"compile": {"run_eagerly": True}},
    "Adam": {"optimizer": adam},
    "gradient accumulation": {
        "optimizer_options": {"gradient_accumulation_steps": 2},
        "batch_size": BATCH // 2,
    },
    "clipnorm": {"optimizer_options": {"clipnorm": 0.1}},
    "EMA": {"optimizer_options": {"use_ema": True}},
    "sample_weight": {"weighted": True},
    "growth by several batches": {"method": {"gradient_batches": 2}},
    "own loop": {"by_hand": True},
}
# Independent set-ups that share a run, as tracing takes most of its time.
TOGETHER = [
    (
        "float32",
        "steps_per_execution",
        "sample_weight",
        "growth by several batches",
        "Adam",
        "EMA",
    ),
    ("mixed_float16", "gradient accumulation"),
    ("mixed_bfloat16", "clipnorm"),
    ("jit_compile",),
    ("run_eagerly",),
    ("own loop",),
]


def options_of(setups):
    """Returns the arguments for a run with several set-ups."""
    options = {}
    for setup in setups:
        both = options.keys() & SETUPS[setup].keys()
        assert not both, f"Two of {setups} set {both}."
        options.update(SETUPS[setup])
    return options


# Pairs that are not supported, and why.
UNSUPPORTED = {}


def support_table() -> str:
    """Returns the table of docs/supported_models.md: kinds by set-ups."""
    lines = [
        "| | " + " | ".join(SETUPS) + " |",
        "|---" * (len(SETUPS) + 1) + "|",
    ]
    for kind in KINDS:
        cells = ["–" if (kind, s) in UNSUPPORTED else "✓" for s in SETUPS]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
