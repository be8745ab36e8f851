"""How masks move while a model trains."""

from rigl_keras.diagnostics.callback import TopologyDiagnostics
from rigl_keras.diagnostics.measures import (
    churn,
    dead_units,
    densities,
    ever_active,
    explored,
    measure,
    overlap,
)
from rigl_keras.diagnostics.plots import figures
from rigl_keras.diagnostics.table import ALL, COLUMNS, read_rows

__all__ = [
    "ALL",
    "COLUMNS",
    "TopologyDiagnostics",
    "churn",
    "dead_units",
    "densities",
    "ever_active",
    "explored",
    "figures",
    "measure",
    "overlap",
    "read_rows",
]
