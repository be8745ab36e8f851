"""Every method: the contracts hold for each row, and a new one is one more."""

from rigl_keras.methods.pruning import MagnitudePruning
from rigl_keras.methods.rigl import SET, SNFS, RigL
from rigl_keras.schedules import SparsityRamp


def pruning(frequency=2, end_step=9, **options):
    """From the density that models here have to a quarter of it."""
    ramp = SparsityRamp(
        final_density=0.05,
        initial_density=0.2,
        begin_step=1,
        end_step=end_step,
        frequency=frequency,
    )
    return [MagnitudePruning(ramp)]


# The contracts hold for every method: a new one is one more row.
METHODS = {
    "static": lambda **options: [],
    "RigL": lambda **options: [RigL(**options)],
    "SET": lambda **options: [SET(**options)],
    "SNFS": lambda **options: [SNFS(**options)],
    "RigL-SG": lambda **options: [RigL(redistribution="gradient", **options)],
    "RigL-SM": lambda **options: [RigL(redistribution="momentum", **options)],
    "MagnitudePruning": pruning,
}


DYNAMIC = {
    name: method
    for name, method in METHODS.items()
    if name not in ("static", "MagnitudePruning")
}


NEED_MOMENTUM = ("SNFS", "RigL-SM")


WINDOW = dict(frequency=3, drop_fraction=0.4, end_step=12)
