"""The choices of both references, by hand, and errors."""

import dataclasses
import inspect
import re

import pytest

import rigl_keras
from rigl_keras import conventions
from rigl_keras.conventions import Conventions

# Each choice under ORIGINAL and under REPORT.
TABLE = {
    "first_update": ("frequency", "frequency_minus_one"),
    "end_is_included": (True, False),
    "drop_fraction_lag": (0, 1),
    "drop_rounding": ("floor", "ceil"),
    "drop_ranking": ("active", "all"),
    "grow_ranking": ("inactive", "all"),
    "regrown_value": ("kept", "zero"),
    "spare_dense_layers": (False, True),
    "redistribution_total": ("conserved", "corrected"),
    "update_replaces_step": (True, True),
    "erk_rounding": ("zeros", "zeros_and_ones"),
    "sampling": ("exact", "bernoulli"),
    "unit_score": ("mean_of_magnitudes", "magnitude_of_mean"),
}


def test_presets():
    for preset, column in ((conventions.ORIGINAL, 0), (conventions.REPORT, 1)):
        assert dataclasses.asdict(preset) == {
            name: values[column] for name, values in TABLE.items()
        }
    assert Conventions() == conventions.ORIGINAL
    assert rigl_keras.ORIGINAL is conventions.ORIGINAL
    assert rigl_keras.REPORT is conventions.REPORT


def test_is_a_frozen_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        conventions.ORIGINAL.drop_rounding = "ceil"
    mixed = dataclasses.replace(conventions.ORIGINAL, drop_rounding="ceil")
    assert mixed.drop_rounding == "ceil"
    assert conventions.ORIGINAL.drop_rounding == "floor"
    assert len({conventions.ORIGINAL, Conventions(), mixed}) == 2  # hashable
    with pytest.raises(TypeError):
        Conventions("frequency")  # takes only keyword arguments


@pytest.mark.parametrize("field", TABLE)
def test_each_field_is_documented_with_its_sources(field):
    documented = re.search(
        rf"^    {field}: (.*?)(?=^    \w+: |^Raises:)",
        inspect.getdoc(Conventions),
        re.MULTILINE | re.DOTALL,
    )
    assert documented, field
    assert "PT" in documented[1] and re.search("TF1|paper", documented[1])


def test_the_table_is_complete():
    assert [f.name for f in dataclasses.fields(Conventions)] == list(TABLE)


@pytest.mark.parametrize("field", TABLE)
def test_each_choice_is_accepted(field):
    for value in TABLE[field]:
        assert getattr(Conventions(**{field: value}), field) == value


@pytest.mark.parametrize("bad", ["nonsense", None, 2, ("floor",), ["floor"]])
@pytest.mark.parametrize(
    "field",
    [name for name, values in TABLE.items() if not isinstance(values[0], bool)],
)
def test_bad_choice(field, bad):
    with pytest.raises(ValueError, match=f"{field}.*Received: {field}=") as e:
        Conventions(**{field: bad})
    for choice in TABLE[field]:
        assert str(choice) in str(e.value)


@pytest.mark.parametrize(
    "field",
    [name for name, values in TABLE.items() if isinstance(values[0], bool)],
)
def test_bad_bool(field):
    # A string from a configuration file is truthy, "False" included.
    with pytest.raises(ValueError, match=f"{field}.*'False'"):
        Conventions(**{field: "False"})


def test_unknown_field():
    with pytest.raises(TypeError, match="drop_roundin"):
        Conventions(drop_roundin="floor")
