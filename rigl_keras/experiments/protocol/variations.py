"""The report's variations: seeds, densities, settings of its figures."""

from pathlib import Path

__all__ = [
    "Changes",
    "CIFAR100",
    "DENSITIES",
    "FIGURE_1",
    "FIGURE_1C",
    "FIGURE_4",
    "FULL",
    "GIN_FOLDER",
    "LEARNING_RATES",
    "METHODS",
    "METHODS_AT_HALF",
    "METHODS_DENSITIES",
    "RIGL",
    "RIGL_RESNET50",
    "SEEDS",
    "TUNED",
    "UPDATES",
]

GIN_FOLDER = Path(__file__).parents[1] / "gin"  # a link in a clone
FULL = "full"  # the preset that changes nothing
SEEDS = (0, 1, 2)  # the report's, section 4.5
DENSITIES = (0.05, 0.1, 0.2, 0.5)  # in Figure 1
Changes = tuple[tuple[str, float], ...]  # of gin bindings
# Figure 1: each method by its initialisation, over the density.
FIGURE_1 = (
    "dense_wrn",
    "small_dense_wrn",
    "static_uniform_wrn",
    "static_erk_wrn",
    "set_uniform_wrn",
    "set_erk_wrn",
    "rigl_uniform_wrn",
    "rigl_erk_wrn",
    "snfs_uniform_wrn",
    "snfs_erk_wrn",
    "pruning_wrn",
)
# Figure 1(c): at twice the length, beside what they are compared with.
FIGURE_1C = (
    "dense_wrn",
    "pruning_wrn",
    "rigl_erk_wrn",
    "static_uniform_2x_wrn",
    "set_uniform_2x_wrn",
    "rigl_uniform_2x_wrn",
)
# The figure of CIFAR-100, which the journal version calls Figure 2.
CIFAR100 = (
    "dense_resnet50",
    "static_uniform_resnet50",
    "set_uniform_resnet50",
    "rigl_uniform_resnet50",
    "snfs_uniform_resnet50",
    "pruning_resnet50",
    "rigl_erk_resnet50",
    "snfs_erk_resnet50",
    "rigl_uniform_2x_resnet50",
    "rigl_erk_2x_resnet50",
    "rigl_uniform_3x_resnet50",
)
RIGL = ("rigl_uniform_wrn", "rigl_erk_wrn")
RIGL_RESNET50 = ("rigl_uniform_resnet50", "rigl_erk_resnet50")
FIGURE_4 = (
    *RIGL,
    "rigl_sg_uniform_wrn",
    "rigl_sm_uniform_wrn",
)
# RigL beside later methods, which the report does not compare. The pattern 2:4
# keeps half of the weights, so RigL beside it does too.
METHODS_DENSITIES = (0.05, 0.02)
METHODS = (
    "static_erk_wrn",
    "set_erk_wrn",
    "rigl_erk_wrn",
    "itop_wrn",
    "granet_wrn",
    "mest_wrn",
    "gse_wrn",
    "srigl_wrn",
    "pruning_wrn",
)
METHODS_AT_HALF = ("rigl_erk_wrn", "rigl_2_4_wrn")
# Figure 2 and section 5.3: RigL's (drop fraction, frequency) and learning rates
# of the reproduction's makefiles/cifar10_tuning.mk, where the report's text has
# lost them.
UPDATES = ((0.3, 100), (0.4, 200), (0.4, 500), (0.5, 750))
LEARNING_RATES = (0.1, 0.05, 0.01, 0.005)
# The changes that Figure 2 and Table 4 vary; others make other rows.
TUNED = frozenset({"UPDATE_FRACTION", "UPDATE_FREQUENCY", "sgd.learning_rate"})
