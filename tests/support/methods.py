"""Every method, as rows of a table that the contract tests run through."""

import inspect

from rigl_keras.methods.acdc import ACDC
from rigl_keras.methods.granet import GraNet
from rigl_keras.methods.gse import GSE
from rigl_keras.methods.mest import MEST
from rigl_keras.methods.pruning import MagnitudePruning
from rigl_keras.methods.rigl import SET, SNFS, RigL
from rigl_keras.methods.srigl import SRigL
from rigl_keras.methods.stored_weights import SRSTE, TopKAST
from rigl_keras.schedules import SparsityRamp


def pruning(frequency=2, end_step=9, **options):
    """Prunes to a quarter of the density that models have here."""
    ramp = SparsityRamp(
        final_density=0.05,
        initial_density=0.2,
        begin_step=1,
        end_step=end_step,
        frequency=frequency,
    )
    return [MagnitudePruning(ramp)]


def taken(method, options, **others):
    """Makes a method with those of the options that it takes."""
    names = inspect.signature(method).parameters
    given = {name: value for name, value in options.items() if name in names}
    return [method(**others, **given)]


def granet(frequency=2, end_step=9, **options):
    """Prunes to a quarter of the density that models have here."""
    last = end_step // frequency * frequency  # the last update
    return taken(
        GraNet,
        {"frequency": frequency, "end_step": end_step, **options},
        final_density=0.05,
        initial_density=0.2,
        prune_end_step=max(min(end_step - 1, last), 1),
        final_drop_fraction=0.0,
    )


def acdc(frequency=2, end_step=9, **options):
    """Is compressed at the first switch, dense at the second, and so on."""
    turns = range(frequency, end_step + 1, frequency)
    odd = len(turns) - (len(turns) + 1) % 2
    return taken(ACDC, options, density=0.1, switch_steps=turns[:odd])


# The contracts hold for every method. Add a row for a new one.
CORE = {
    "static": lambda **options: [],
    "RigL": lambda **options: [RigL(**options)],
    "SET": lambda **options: [SET(**options)],
    "SNFS": lambda **options: [SNFS(**options)],
    "RigL-SG": lambda **options: [RigL(redistribution="gradient", **options)],
    "RigL-SM": lambda **options: [RigL(redistribution="momentum", **options)],
    "MagnitudePruning": pruning,
}
NEWER = {
    "GraNet": granet,
    "MEST": lambda **options: taken(MEST, {"drop_fraction": 0.1, **options}),
    "GSE": lambda **options: taken(GSE, options),
    "ACDC": acdc,
    "TopKAST": lambda **options: taken(TopKAST, options),
    "SRigL": lambda **options: taken(SRigL, options),
    "SRSTE": lambda **options: taken(SRSTE, options),
}
METHODS = CORE | NEWER

# Methods that keep the number of connections of each layer. Others keep only
# that of the model.
CONSTANT = ("static", "RigL", "SET", "GSE", "TopKAST", "SRSTE")
SCHEDULED = ("MagnitudePruning", "GraNet", "MEST", "ACDC", "SRigL")

DYNAMIC = {
    name: method
    for name, method in CORE.items()
    if name not in ("static", "MagnitudePruning")
}


NEED_MOMENTUM = ("SNFS", "RigL-SM")

# Methods with state beyond the model and its optimizer.
REMEMBER = ("MEST", "TopKAST", "SRigL", "SRSTE")


WINDOW = dict(frequency=3, drop_fraction=0.4, end_step=12)
