"""The choices on which the references of RigL differ, as one value.

Three public codebases implement RigL, and no two agree in every detail.
`ORIGINAL` follows Algorithm 1 of the paper (Evci et al., 2020,
arXiv:1911.11134) and, where that says nothing, the authors' TensorFlow code
(google-research/rigl, `rigl/`). `REPORT` follows the PyTorch reproduction
behind the report (varun19299/rigl-reproducibility, `sparselearning/`),
including its quirks, so that its runs can be replayed.
"""

import dataclasses
from typing import Literal

from rigl_keras._checks import boolean, choice, integer

__all__ = ["Conventions", "ORIGINAL", "REPORT", "check_conventions"]

_CHOICES = {
    "first_update": ("frequency", "frequency_minus_one"),
    "drop_rounding": ("floor", "ceil"),
    "drop_ranking": ("active", "all"),
    "grow_ranking": ("inactive", "all"),
    "regrown_value": ("kept", "zero"),
    "redistribution_total": ("conserved", "corrected"),
    "erk_rounding": ("zeros", "zeros_and_ones"),
    "sampling": ("exact", "bernoulli"),
    "unit_score": ("mean_of_magnitudes", "magnitude_of_mean"),
}
_SWITCHES = ("end_is_included", "spare_dense_layers", "update_replaces_step")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conventions:
    """What an update does where the paper, its code and the report disagree.

    Each argument names the ORIGINAL choice first. TF1 stands for the authors'
    code, PT for the PyTorch reproduction; the numbers are file:line there.

    Args:
        first_update: `"frequency"`: step t is an update step when
            t mod frequency = 0 and t > 0 (paper, Algorithm 1).
            `"frequency_minus_one"`: when (t + 1) mod frequency = 0 (PT,
            main.py:69-74). Steps are counted from 0.
        end_is_included: Whether an update may fall on `end_step` itself
            (True: TF1, sparse_optimizers_base.py:217-226; False: PT,
            main.py:69-74).
        drop_fraction_lag: By how many steps the drop fraction of an update is
            older than the update. 0: the schedule's value at the step itself
            (paper, eq. 1). 1: the value of the previous step, computed when
            that step ended (PT, core.py:688-692).
        drop_rounding: The number of connections dropped is n x drop_fraction
            rounded by `"floor"` (TF1, sparse_optimizers_base.py:286-290) or
            by `"ceil"` (PT, funcs/prune.py:41).
        drop_ranking: The entries ranked for the drop. `"active"`: those the
            mask keeps (paper, section 3). `"all"`: the whole tensor. There,
            active weights that are exactly zero tie with inactive ones, and
            fewer may be dropped than asked for (PT, funcs/prune.py:46-50). TF1
            ranks all with noise of 1e-5 (sparse_optimizers_base.py:260-272); no
            default does.
        grow_ranking: The entries ranked for growth. `"inactive"`: those off
            after the drop, dropped ones included (paper, section 3; TF1,
            sparse_optimizers_base.py:305-316). `"all"`: every entry, with a
            score of zero for active ones. Where gradients vanish, this may pick
            an active weight and zero it (PT, funcs/grow.py:79-95).
        regrown_value: The value of a connection that one update drops and grows
            again: its weight (`"kept"`; TF1, sparse_optimizers_base.py:328-333)
            or `"zero"` (PT, funcs/grow.py:95). Its optimizer memory stays in
            both cases.
        spare_dense_layers: Whether a layer of sparsity s < 0.2 drops only the
            fraction min(s, drop_fraction) if it holds more than its share
            (1 / layers) of all nonzero weights, or of the score that moves
            density (PT, core.py:250-269; not in the paper or in TF1).
        redistribution_total: Whether an update that moves density between
            layers grows exactly as many connections as it drops
            (`"conserved"`), or rounds layer by layer and corrects the
            difference in later updates (`"corrected"`; PT, core.py:285-346 and
            763-773). TF1 does not redistribute.
        update_replaces_step: Whether an update takes the place of the
            optimizer step (paper, Algorithm 1; TF1 for RigL,
            sparse_optimizers_base.py:521; PT, main.py:69-78). False: the
            step is taken first, then the masks change (TF1 for SET,
            sparse_optimizers_base.py:145-146). An update step counts as a
            step in every case.
        erk_rounding: How ER and ERK turn a density d into counts for a
            layer of n weights while solving for their scale.
            `"zeros"`: floor((1-d) n) zeros, the rest ones (TF1,
            sparse_utils.py:35, 151-162). `"zeros_and_ones"`: both truncated,
            so that a layer may lack one (PT, funcs/init_scheme.py:91-92).
        sampling: Random masks, and SET's random growth, with an `"exact"`
            number of ones (TF1, sparse_utils.py:48-68) or as independent
            `"bernoulli"` draws, whose total varies (PT,
            funcs/init_scheme.py:156, funcs/grow.py:126-130).
        unit_score: What a unit of several weights (a kernel, a block) is
            worth, by weights or gradients x. `"mean_of_magnitudes"`:
            mean |x|, which says how large they are; neither the paper nor
            TF1 has such units. `"magnitude_of_mean"`: |mean x|, so that
            weights of opposite signs cancel (PT, struct_magnitude_prune in
            funcs/prune.py and struct_abs_grad_growth in funcs/grow.py).

    Raises:
        ValueError: An argument has a value that is not allowed.

    Example:

    >>> import dataclasses
    >>> dataclasses.replace(ORIGINAL, drop_rounding="ceil").drop_rounding
    'ceil'
    """

    first_update: Literal["frequency", "frequency_minus_one"] = "frequency"
    end_is_included: bool = True
    drop_fraction_lag: int = 0
    drop_rounding: Literal["floor", "ceil"] = "floor"
    drop_ranking: Literal["active", "all"] = "active"
    grow_ranking: Literal["inactive", "all"] = "inactive"
    regrown_value: Literal["kept", "zero"] = "kept"
    spare_dense_layers: bool = False
    redistribution_total: Literal["conserved", "corrected"] = "conserved"
    update_replaces_step: bool = True
    erk_rounding: Literal["zeros", "zeros_and_ones"] = "zeros"
    sampling: Literal["exact", "bernoulli"] = "exact"
    unit_score: Literal["mean_of_magnitudes", "magnitude_of_mean"] = (
        "mean_of_magnitudes"
    )

    def __post_init__(self):
        for field, choices in _CHOICES.items():
            choice(f"Conventions.{field}", getattr(self, field), choices)
        for field in _SWITCHES:
            value = boolean(f"Conventions.{field}", getattr(self, field))
            object.__setattr__(self, field, value)
        lag = integer(
            "Conventions.drop_fraction_lag",
            self.drop_fraction_lag,
            at_least=0,
            at_most=1,
            rule="must be 0 (the step's own value) or 1 (the value of the "
            "step before)",
        )
        object.__setattr__(self, "drop_fraction_lag", lag)


ORIGINAL = Conventions()
REPORT = Conventions(
    first_update="frequency_minus_one",
    end_is_included=False,
    drop_fraction_lag=1,
    drop_rounding="ceil",
    drop_ranking="all",
    grow_ranking="all",
    regrown_value="zero",
    spare_dense_layers=True,
    redistribution_total="corrected",
    erk_rounding="zeros_and_ones",
    sampling="bernoulli",
    unit_score="magnitude_of_mean",
)


def check_conventions(conventions) -> None:
    """Raises ValueError unless the value is a `Conventions`."""
    if not isinstance(conventions, Conventions):
        raise ValueError(
            "conventions must be rigl_keras.ORIGINAL, rigl_keras.REPORT or a "
            f"Conventions that you make. Received: conventions={conventions!r}."
        )
