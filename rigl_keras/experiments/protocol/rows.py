"""Names of runs, and what the name of a gin file says about its row."""

import dataclasses
import re
import urllib.parse
from collections.abc import Iterable

from rigl_keras._text import exact
from rigl_keras.experiments.protocol import variations

__all__ = ["NETWORKS", "NOT_RUNS", "Row", "known", "row", "run_name"]

# Folders beside those of runs: scripts and logs of SLURM, and searches.
NOT_RUNS = ("slurm", "studies")

# The network and its data, by the ending of the gin file.
NETWORKS = {
    "wrn": "WRN-22-2 on CIFAR-10",
    "resnet50": "ResNet-50 on CIFAR-100",
    "gpt": "GPT on python_docs",
}
_METHODS = {
    "dense": "Dense",
    "small_dense": "Small-Dense",
    "static": "Static",
    "set": "SET",
    "rigl": "RigL",
    "snfs": "SNFS",
    "pruning": "Pruning",
    "lottery": "Lottery",
    "rigl_sg": "RigL-SG",
    "rigl_sm": "RigL-SM",
    "rigl_reinit": "RigL, re-initialised",
    "rigl_kernel": "RigL-Struct",
    "snip": "SNIP",
    "grasp": "GraSP",
    "synflow": "SynFlow",
    "magnitude": "Magnitude",
    "rigl_2_4": "RigL 2:4",
    "itop": "RigL-ITOP",
    "granet": "GraNet",
    "mest": "MEST",
    "gse": "GSE",
    "srigl": "SRigL",
    "acdc": "AC/DC",
}
_DISTRIBUTIONS = {"uniform": "uniform", "erk": "ERK", "er": "ER"}
_NAME = re.compile(
    r"(?P<method>\w+?)(_(?P<distribution>uniform|erk|er))?"
    r"(_(?P<length>\d)x)?(?P<all_data>_50k)?_(?P<network>wrn|resnet50|gpt)"
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the report, or a similar one.

    Args:
        gin: The gin file, without folder and ending.
        method: The report's name of the method.
        distribution: `"uniform"`, `"ERK"`, `"ER"`, or `""` if masks are not
            drawn.
        length: Length of training, relative to the other rows.
        all_data: Whether it also trains on the held-out images.
        network: One of `NETWORKS`, or `""`.
    """

    gin: str
    method: str
    distribution: str = ""
    length: float = 1
    all_data: bool = False
    network: str = ""

    @property
    def label(self) -> str:
        """Its name in figures, without its network."""
        parts = [self.method]
        if self.distribution:
            parts.append(f"({self.distribution})")
        if self.length != 1:
            parts.append(f"{exact(self.length)}x")
        if self.all_data:
            parts.append("50k")
        return " ".join(parts)

    @property
    def dense(self) -> bool:
        """Whether it is the dense network, which has no density."""
        return self.method == _METHODS["dense"]


def row(gin: str) -> Row:
    """Returns the row of a name; other names are methods themselves.

    Args:
        gin: The gin file, without folder and ending.
    """
    found = _NAME.fullmatch(gin)
    if found is None or found["method"] not in _METHODS:
        return Row(gin, gin)
    return Row(
        gin,
        _METHODS[found["method"]],
        _DISTRIBUTIONS.get(found["distribution"], ""),
        int(found["length"] or 1),
        found["all_data"] is not None,
        found["network"],
    )


# Frequent changes in names, and their short forms.
_SHORT = {
    "UPDATE_FRACTION": "update_fraction",
    "UPDATE_FREQUENCY": "update_frequency",
    "sgd.learning_rate": "learning_rate",
    "train.length": "length",
}


def run_name(
    gin: str,
    density: float | None,
    seed: int,
    changes: Iterable[tuple[str, float]] = (),
) -> str:
    """Returns the name of a run's folder; different runs differ in it.

    Args:
        gin: The gin file, without folder and ending.
        density: Fraction of the weights kept. None: a dense model.
        seed: The seed.
        changes: gin bindings that override the files, in any order; the last of
            a name counts.
    """
    parts = [gin]
    if density is not None:
        parts.append(f"density{exact(density)}")
    for name, value in sorted(dict(changes).items()):
        if name in _SHORT:
            parts.append(f"{_SHORT[name]}{exact(value)}")
        else:
            # Slashes of gin scopes would make folders.
            parts.append(f"{urllib.parse.quote(name, safe='')}={exact(value)}")
    return "-".join([*parts, f"seed{seed}"])


def known() -> list[str]:
    """Returns the names of all gin files, without folder and ending."""
    return sorted(path.stem for path in variations.GIN_FOLDER.glob("*.gin"))
