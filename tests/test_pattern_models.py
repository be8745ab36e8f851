"""Models whose masks have patterns: drawn, trained, pruned, saved, exported."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers
from support.patterns import PATTERNS, group_counts
from support.small_models import small_model

import rigl_keras
from rigl_keras.conventions import REPORT
from rigl_keras.masking.masked import Masked
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.selection import named_kernels
from rigl_keras.masking.sparsify import sparsify, with_masks
from rigl_keras.methods.one_shot import snip
from rigl_keras.methods.pruning import MagnitudePruning
from rigl_keras.methods.rigl import SET, SNFS, RigL
from rigl_keras.patterns import NM, Blocks, Element, FanIn, as_pattern
from rigl_keras.schedules import SparsityRamp

# Layers of one model, each with its own pattern.
MIXED = {
    "stem": "kernel",
    "conv": "2:4",
    "hidden": "fan_in",
    "blocks": Blocks(5, 4),
}


def mixed_model():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(8, 3, name="stem", activation="relu")(inputs)
    x = layers.Conv2D(6, 3, name="conv", activation="relu")(x)
    x = layers.Flatten()(x)
    x = layers.Dense(12, name="hidden", activation="relu")(x)
    x = layers.Dense(10, name="blocks", activation="relu")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def mixed(density=0.5, **options):
    if density < 1:
        options["densities"] = {"head": 0.5}  # ERK would keep it dense
    return sparsify(mixed_model(), density, granularity=MIXED, **options)


def examples(n=24):
    draw = np.random.default_rng(0)
    x = draw.standard_normal((n, 6, 6, 3)).astype(np.float32)
    return x, draw.standard_normal((n, 3)).astype(np.float32)


def counts(model):
    """Returns `{name: number of kept units in each group}`, by counting."""
    return {
        name: group_counts(
            as_pattern(m.granularity), m.found.axes, m.mask.numpy()
        )
        for name, m in masked_layers(model).named.items()
    }


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_masks_are_drawn_with_their_pattern(name, distribution):
    pattern = PATTERNS[name]
    fixed = isinstance(pattern, NM)
    dense = small_model()
    model = sparsify(
        dense,
        None if fixed else 0.6,
        granularity=name,
        distribution=distribution,
    )
    for layer, (found, m) in zip(
        counts(model).values(), masked_layers(model).named.items(), strict=True
    ):
        # Each group keeps the same number.
        assert len(set(layer)) == 1 and layer[0] > 0, found
        assert layer[0] == round(m.density * m.layout.size) or name == "4x3"
        if fixed:
            assert m.density == pattern.n / pattern.m
        assert not m.kernel.numpy()[m.mask.numpy() == 0].any()
    names = [m.name for m in masked_layers(model)]
    if fixed or name == "4x3":
        # 3 channels are not a multiple of 2 or 4; a depthwise kernel has one.
        # Under "uniform" the first layer stays dense anyway.
        assert ("conv1" in names) == (name == "4x3" and distribution == "erk")
        assert names[-2:] == ["conv2", "head"] and "depthwise" not in names
    cost = rigl_keras.count(model)
    plain = sum(v.numpy().size for v in rigl_keras.strip(model).weights)
    zeros = sum((~m.mask.numpy()).sum() for m in masked_layers(model))
    assert cost.nonzeros <= plain - zeros
    again = masked_layers(
        sparsify(
            dense,
            None if fixed else 0.6,
            granularity=pattern,
            distribution=distribution,
        )
    )
    for m, other in zip(masked_layers(model), again, strict=True):
        np.testing.assert_array_equal(m.mask, other.mask)


def test_what_does_not_fit_is_listed_with_the_reason():
    table = str(masked_layers(sparsify(small_model(), granularity="2:4")))
    text = " ".join(table.split())
    assert "conv1: left dense: '2:4' does not fit: its 3 inputs" in text
    assert "depthwise: left dense: '2:4' does not fit: depthwise" in text
    inputs = keras.Input((8, 8, 4))
    x = layers.SeparableConv2D(8, 3, name="separable")(inputs)
    model = sparsify(keras.Model(inputs, x), granularity="2:4")
    (masked,) = masked_layers(model)
    assert masked.name == "separable/pointwise_kernel"
    text = " ".join(str(masked_layers(model)).split())
    assert "depthwise_kernel (3x3x4x1): '2:4' does not fit" in text


def test_fan_in_keeps_round_of_density_times_inputs():
    model = sparsify(small_model(), 0.3, granularity="fan_in")
    shapes = {n: m.mask.shape for n, m in masked_layers(model).named.items()}
    wanted = rigl_keras.distributions.layer_densities(shapes, 0.3)
    fan_in = {"conv1": 27, "depthwise": 9, "conv2": 72, "head": 64}
    for name, kept in counts(model).items():
        each = round(wanted[name] * fan_in[name])
        assert set(kept) == {each}
        assert len(kept) == shapes[name][-1] * (8 if name == "depthwise" else 1)
    # At least one input, so that no unit is dead.
    few = sparsify(small_model(), 0.01, granularity="fan_in")
    assert min(min(kept) for kept in counts(few).values()) == 1


def test_each_layer_may_have_its_own():
    model = mixed()
    found = {n: m.granularity for n, m in masked_layers(model).named.items()}
    assert found == {
        "stem": "kernel",
        "conv": "2:4",
        "hidden": "fan_in",
        "blocks": "5x4",
        "head": "element",
    }
    assert set(counts(model)["conv"]) == {2}
    by_type = sparsify(
        mixed_model(), 0.5, granularity={layers.Dense: "fan_in", "head": "1:2"}
    )
    found = [m.granularity for m in masked_layers(by_type)]
    assert found == ["element", "element", "fan_in", "fan_in", "1:2"]
    layer = mixed_model()
    by_layer = sparsify(layer, 0.5, granularity={layer.layers[2]: NM(1, 4)})
    assert masked_layers(by_layer).named["conv"].density == 0.25
    ones = sum(int(m.mask.numpy().sum()) for m in masked_layers(by_layer))
    size = sum(m.mask.numpy().size for m in masked_layers(by_layer))
    assert ones == round(0.5 * size)  # other layers compensate


def test_densities_of_n_of_m():
    dense = mixed_model()
    options = dict(granularity="1:3", layers=dense.get_layer("stem"))
    for density in (None, 0.333, 1 / 3):
        model = sparsify(dense, density, **options)
        assert masked_layers(model)[0].density == pytest.approx(1 / 3)
    whole = sparsify(dense, 1.0, **options)
    assert masked_layers(whole)[0].density == 1
    options = dict(granularity={layers.Dense: "2:4"}, layers=layers.Dense)
    given = sparsify(
        sized(), granularity="2:4", densities={"head": 1.0, "hidden": 0.5}
    )
    assert [m.density for m in masked_layers(given)] == [0.5, 1.0]


def sized():
    inputs = keras.Input((8,))
    x = layers.Dense(8, name="hidden")(inputs)
    return keras.Model(inputs, layers.Dense(4, name="head")(x))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(density=0.3, granularity="2:4"),
            r"overall density: 0.5. Leave density",
        ),
        (dict(), "density is the fraction of weights kept.*density=None"),
        (dict(granularity="fan_in"), "out only if the pattern"),
        (
            dict(granularity="2:4", densities={"hidden": 0.3}),
            "density 0.3, but its pattern '2:4' fixes 0.5",
        ),
        (dict(density=0.5, granularity="3:5"), "(?s)No kernel is left.*8 inp"),
        (dict(density=0.5, granularity={"hiden": "2:4"}), "names hiden, which"),
        (
            dict(density=0.5, granularity={layers.Conv2D: "2:4"}),
            "granularity names Conv2D, which is not a masked layer",
        ),
        (dict(density=0.5, granularity={"head": "2;4"}), "must be one of"),
        (
            dict(density=0.5, granularity="fan_in", conventions=REPORT),
            "draws each weight independently.*'hidden' keeps the same number",
        ),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sparsify(sized(), **options)


def test_what_was_asked_for_must_fit():
    dense = mixed_model()
    for options in (
        dict(strict=True),
        dict(layers=[dense.get_layer("stem"), dense.get_layer("conv")]),
    ):
        with pytest.raises(ValueError, match="(?s)stem: '2:4' does not fit"):
            sparsify(dense, granularity="2:4", **options)
    for key in ("stem", dense.get_layer("stem"), layers.Conv2D):
        granularity = {key: "2:4" if key != layers.Conv2D else "3:5"}
        with pytest.raises(
            ValueError, match="(?s)gives a pattern.*stem: '.* 3 inp"
        ):
            sparsify(dense, 0.5, granularity=granularity)
    # A type or a rule does not name a layer.
    model = sparsify(dense, granularity="2:4", layers=layers.Conv2D)
    assert [m.name for m in masked_layers(model)] == ["conv"]
    layer = Masked(layers.Dense(3), granularity="2:4")
    with pytest.raises(ValueError, match="6 inputs are not a multiple of 4"):
        layer.build((None, 6))


def test_given_masks_must_have_the_pattern():
    mask = np.zeros((8, 8), bool)
    mask[[0, 1, 4, 6]] = True
    for pattern in ("2:4", "fan_in", "1x8"):
        ticket = with_masks(sized(), {"hidden": mask}, granularity=pattern)
        assert masked_layers(ticket)[0].granularity == pattern
    with_masks(sized(), {"hidden": np.ones((8, 8))}, granularity="2:4")
    mask[0, 0], mask[2, 0], mask[7, 1] = False, True, True
    for pattern, message in (
        ("2:4", "2 to 3 weights of a group instead of 2 of each"),
        ("fan_in", "keeps 4 to 5 weights of a group instead of the same"),
        ("1x8", "keeps parts of some blocks"),
        (NM(1, 4), "keeps 2 to 3 weights of a group instead of 1"),
    ):
        with pytest.raises(ValueError, match=message):
            with_masks(sized(), {"hidden": mask}, granularity=pattern)


class Watch(keras.callbacks.Callback):
    """Checks the groups and the zeros after every step."""

    def __init__(self, check):
        super().__init__()
        self.check, self.seen = check, []

    def on_train_batch_end(self, batch, logs=None):
        for m in masked_layers(self.model):
            assert not m.kernel.numpy()[m.mask.numpy() == 0].any()
        self.check(counts(self.model))
        self.seen.append(masked_layers(self.model).masks)


def fitted(model, callback, check, **options):
    watch = Watch(check)
    options = {"run_eagerly": True, **options}
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", **options)
    model.fit(*examples(), batch_size=4, verbose=0, callbacks=[callback, watch])
    return watch.seen


def of_the_guide():
    """Returns the custom method of the guide, which ignores patterns."""
    text = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {"rigl_keras": rigl_keras}
    exec(next(b for b in blocks if "MaskUpdate)" in b), names)
    return next(
        value
        for value in names.values()
        if isinstance(value, type) and issubclass(value, rigl_keras.MaskUpdate)
    )


@pytest.mark.parametrize(
    "method, options",
    [
        (RigL, {}),
        (SET, {}),
        (of_the_guide(), {}),
        pytest.param(
            RigL,
            dict(run_eagerly=False, jit_compile=True),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["RigL", "SET", "README", "RigL under XLA"],
)
def test_updates_keep_every_pattern(method, options):
    model = mixed()
    before, masks = counts(model), masked_layers(model).masks

    def check(found):
        assert found == before

    seen = fitted(
        model,
        method(frequency=1, end_step=9, decay="constant"),
        check,
        **options,
    )
    for name, mask in masks.items():
        assert any((found[name] != mask).any() for found in seen), name


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_pruning_keeps_every_pattern(scope):
    model = mixed(1.0)
    ramp = SparsityRamp(final_density=0.3, begin_step=1, end_step=5)

    def check(found):
        for name in ("conv", "hidden"):  # groups keep one number
            assert len(set(found[name])) == 1, name
        assert found["conv"][0] >= 2

    seen = fitted(model, MagnitudePruning(ramp, scope=scope), check)
    for earlier, later in zip(seen, seen[1:], strict=False):
        for name in earlier:
            assert not (later[name] & ~earlier[name]).any()  # none returns
    found = counts(model)
    assert found["conv"][0] == 2
    free = [m for m in masked_layers(model) if m.name != "conv"]
    ones = sum(int(m.mask.numpy().sum()) for m in free)
    assert ones == pytest.approx(
        0.3 * sum(m.mask.numpy().size for m in free), abs=30
    )
    # The kept weights are the largest of their group.
    for m in masked_layers(model):
        if m.name not in ("conv", "hidden"):
            continue
        kept = m.layout.grouped(m.mask.numpy())
        if scope == "layer" and m.name == "hidden":
            assert kept.sum(1)[0] == round(0.3 * kept.shape[1])


@pytest.mark.parametrize("final", [0.2, 0.75])
def test_a_ramp_ends_where_the_pattern_does(final):
    model = sparsify(sized(), 1.0, granularity="2:4")
    model.compile("sgd", "mse")
    ramp = SparsityRamp(final_density=final, begin_step=1, end_step=5)
    with pytest.raises(ValueError, match="Pass final_density=2/4. Received"):
        model.fit(
            np.ones((4, 8)),
            np.ones((4, 4)),
            verbose=0,
            callbacks=[MagnitudePruning(ramp)],
        )


@pytest.mark.parametrize("granularity", ["2:4", "fan_in", "4x2"])
def test_what_moves_single_weights_is_refused(granularity):
    density = None if granularity == "2:4" else 0.5
    for callback, message in (
        (SNFS(), "redistribution moves single weights.*'hidden' keeps"),
        (RigL(redistribution="gradient"), "Pass redistribution=None"),
        (SET(conventions=REPORT), "may grow fewer connections than it drops"),
    ):
        if granularity == "4x2" and isinstance(callback, SET):
            continue
        model = sparsify(sized(), density, granularity=granularity)
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        with pytest.raises(ValueError, match=message):
            model.fit(
                np.ones((4, 8)), np.ones((4, 4)), verbose=0,
                callbacks=[callback],
            )  # fmt: skip


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_one_shot_keeps_every_pattern(scope):
    dense = mixed_model()
    loss = keras.losses.MeanSquaredError()
    single = snip(dense, 0.5, examples(), loss, scope=scope)
    model = snip(dense, 0.5, examples(), loss, scope=scope, granularity=MIXED)
    found = counts(model)
    assert set(found["conv"]) == {2} and len(set(found["hidden"])) == 1
    kinds = [m.granularity for m in masked_layers(model)]
    assert kinds == ["kernel", "2:4", "fan_in", "5x4", "element"]
    masks, others = masked_layers(model).masks, masked_layers(single).masks
    assert all((masks[n] != others[n]).any() for n in ("conv", "hidden"))
    # Without a density, the pattern's is used.
    model = snip(dense, None, examples(), loss, granularity="2:4", scope=scope)
    names = [m.name for m in masked_layers(model)]
    assert "stem" not in names
    assert all(m.density == 0.5 for m in masked_layers(model))


def test_saved_loaded_copied_and_resumed(tmp_path):
    model = mixed()
    method = dict(frequency=1, end_step=9, decay="constant")
    fitted(model, RigL(**method), lambda found: None)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for ours, theirs in zip(
        masked_layers(model), masked_layers(loaded), strict=True
    ):
        assert ours.granularity == theirs.granularity
        np.testing.assert_array_equal(ours.mask, theirs.mask)
    # A layer from a config draws as many connections, with its pattern.
    drawn = keras.Model.from_config(model.get_config())
    assert counts(drawn) == counts(model)
    for m in masked_layers(drawn):
        assert m.layout.breach(m.mask.numpy()) is None
    for one in (model, loaded):
        one.run_eagerly = True
        one.fit(
            *examples(), batch_size=4, shuffle=False, verbose=0,
            callbacks=[RigL(**method)],
        )  # fmt: skip
    for ours, theirs in zip(model.variables, loaded.variables, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_as_earlier_files_name_them():
    """Earlier versions had only `"element"` and `"kernel"`."""
    for name in ("element", "kernel"):
        layer = Masked(layers.Conv2D(4, 3), granularity=name)
        config = layer.get_config()
        assert config["granularity"] == name
        assert Masked.from_config(config).granularity == name


def test_onnx_has_the_groups_of_a_2_4_model(tmp_path):
    """Groups of 4 are along I of OIHW, and along the first axis of Dense
    kernels (inputs, outputs), as TensorRT reads them."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("tf2onnx")
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, name="stem", activation="relu")(inputs)
    x = layers.Conv2D(12, 3, name="conv", activation="relu")(x)
    x = layers.Conv2D(8, 1, name="point", activation="relu")(x)
    x = layers.GlobalAveragePooling2D()(x)
    dense = keras.Model(inputs, layers.Dense(5, name="head")(x))
    model = sparsify(dense, granularity="2:4")
    rigl_keras.export(model, tmp_path / "out", format="onnx", measure=False)
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    assert not graph.sparse_initializer
    found = [onnx.numpy_helper.to_array(t) for t in graph.initializer]
    by_shape = {array.shape: array for array in found}
    checked = {
        (12, 8, 3, 3): lambda a: a.transpose(0, 2, 3, 1),  # O, H, W, I
        (8, 12, 1, 1): lambda a: a.transpose(0, 2, 3, 1),
        (8, 5): np.transpose,  # outputs, inputs
    }
    for shape, inputs_last in checked.items():
        groups = inputs_last(by_shape[shape]).reshape(-1, 4)
        assert (np.count_nonzero(groups, axis=1) == 2).all()
    # Not along other axes.
    other = by_shape[(12, 8, 3, 3)].reshape(-1, 4)
    assert (np.count_nonzero(other, axis=1) != 2).any()
    assert by_shape[(8, 3, 3, 3)].all()  # the stem is dense


def test_the_table_of_the_docs():
    """Each name in the table means the object beside it, and its examples
    exist."""
    text = (Path(__file__).parent.parent / "docs" / "patterns.md").read_text()
    rows = re.findall(r"^\| `(.*?)`.* \| `(.*?)` \|", text, re.MULTILINE)
    assert len(rows) == 5
    for name, made in rows:
        made = eval(made, vars(rigl_keras.patterns))
        assert as_pattern(name.strip('"').replace("n:m", "2:4")) == made
    lines = re.findall(r"sparsify\(model, (.*?)\)(?:$| )", text, re.MULTILINE)
    assert len(lines) == 4
    names = {"keras": keras, "rigl_keras": rigl_keras}
    names["model"] = rigl_keras.models.wide_resnet(10, 1)
    for arguments in lines:
        model = eval(f"rigl_keras.sparsify(model, {arguments})", names)
        assert masked_layers(model)


def test_the_table_of_a_model_names_patterns():
    lines = str(masked_layers(mixed())).splitlines()
    assert lines[0].split()[:3] == ["layer", "kernel", "pattern"]
    assert [line.split()[2] for line in lines[1:6]] == [
        "kernel", "2:4", "fan_in", "5x4", "element",
    ]  # fmt: skip
    assert "pattern" not in str(masked_layers(sparsify(sized(), 0.5)))


def test_patterns_are_part_of_the_library():
    assert rigl_keras.patterns.FanIn() == FanIn()
    assert rigl_keras.patterns.as_pattern("element") == Element()
    assert list(named_kernels(sized())) == ["hidden", "head"]
