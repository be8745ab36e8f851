"""How each data set is split, augmented and normalised."""

from __future__ import annotations

import dataclasses
import difflib
import numbers

from rigl_keras.experiments.data.augmentation import AUGMENTATIONS
from rigl_keras.experiments.data.text import SYMBOLS

__all__ = ["check_integer", "recipe_of"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A dataset of images, and how they are prepared.

    An image x in 0..255 reaches the model as (x / 255 - mean) / std.

    Args:
        name: its name in `load`.
        input_shape: (height, width, channels) of an image.
        num_classes: labels are 0..num_classes - 1.
        mean: per channel, of images scaled to [0, 1].
        std: per channel, of images scaled to [0, 1], > 0.
        augmentation: of training images only. "none"; "pad_crop_flip": 4
            pixels of reflection around the image, a random crop of the
                image's size, a random horizontal flip; or "resized_crop_flip":
                a random box of 8 to 100 % of the area, resized to the image's
                size, and a random horizontal flip.
        validation: number of training examples held out, the last by index,
            >= 0.
        examples: number of training examples, those held out included.
    """

    name: str
    input_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: str
    validation: int
    examples: int

    def __post_init__(self) -> None:
        if self.augmentation not in AUGMENTATIONS:
            raise ValueError(
                f"augmentation must be one of {sorted(AUGMENTATIONS)}. "
                f"Received: augmentation={self.augmentation!r}"
            )
        channels = self.input_shape[-1]
        if len(self.mean) != channels or len(self.std) != channels:
            raise ValueError(
                f"mean and std must have one value per channel, {channels} "
                f"for input_shape={self.input_shape}. Received: "
                f"mean={self.mean}, std={self.std}"
            )
        if min(self.std) <= 0:
            raise ValueError(
                f"std must be > 0 in every channel. Received: std={self.std}"
            )
        check_integer("validation", self.validation, at_least=0)

    @property
    def network_arguments(self) -> dict[str, object]:
        """Arguments for a model of these images."""
        return {
            "num_classes": self.num_classes,
            "input_shape": self.input_shape,
        }


@dataclasses.dataclass(frozen=True)
class TextRecipe:
    """A text, and how it is cut.

    The text is split by position: first training, then validation, then test.

    Args:
        name: Its name in `load`.
        vocabulary: Number of symbols, which are also the classes.
        context: Characters of an example, >= 1.
        validation: Number of characters held out, >= 0.
        test: Number of characters to test on, > context.
        epoch_examples: Examples in an epoch, >= 1, drawn from all for each
            epoch. None: all.
    """

    name: str
    vocabulary: int
    context: int
    validation: int
    test: int
    epoch_examples: int | None = None

    def __post_init__(self) -> None:
        check_integer("context", self.context, at_least=1)
        if self.epoch_examples is not None:
            check_integer("epoch_examples", self.epoch_examples, at_least=1)
        check_integer("validation", self.validation, at_least=0)
        if 0 < self.validation <= self.context or self.test <= self.context:
            raise ValueError(
                "What is held out must be longer than one example: validation "
                "and test > context, or validation = 0. Received: "
                f"validation={self.validation}, test={self.test}, "
                f"context={self.context}."
            )

    @property
    def num_classes(self) -> int:
        return self.vocabulary

    @property
    def network_arguments(self) -> dict[str, object]:
        """Arguments for a model of this text."""
        return {"vocabulary": self.vocabulary, "context": self.context}

    def windows(self, characters: int) -> int:
        """Returns the number of windows for any start of the first.

        Args:
            characters: Length of the whole text.

        Raises:
            ValueError: It is too short.
        """
        left = characters - self.validation - self.test
        # The first window starts at one of `context` characters.
        count = (left - self.context) // self.context
        if count < 1:
            raise ValueError(
                f"The text {self.name!r} has {characters} characters: "
                f"{self.validation} for validation, {self.test} for the test, "
                f"and too few are left for windows of {self.context}. Hold out "
                "less, or make context smaller."
            )
        return count

    def training_examples(self, characters: int) -> int:
        """Returns the number of windows in an epoch.

        Args, Raises: As in `windows`.
        """
        found = self.windows(characters)
        return min(found, self.epoch_examples or found)


def recipe_of(
    name: str,
    *,
    validation: int | None = None,
    context: int | None = None,
    epoch_examples: int | None = None,
) -> Recipe | TextRecipe:
    """Returns the recipe of a data set, with changes.

    Args:
        name: One of `DATASETS` or `TEXTS`.
        validation: Size of the validation part: training examples, or
            characters of a text. None: the recipe's.
        context: Characters in an example of a text. None: the recipe's.
        epoch_examples: Examples in an epoch of a text. None: all.

    Raises:
        ValueError: There is no such data set, images get a context, or a number
            is out of range.
    """
    known = {**DATASETS, **TEXTS}
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"name must be one of {sorted(known)}. "
            f"Received: name={name!r}.{hint}"
        )
    changes = {} if validation is None else {"validation": validation}
    for setting, value in (
        ("context", context),
        ("epoch_examples", epoch_examples),
    ):
        if value is not None:
            if name not in TEXTS:
                raise ValueError(
                    f"{setting} is a setting of texts, but {name!r} has "
                    f"images. Leave it out. Received: {setting}={value!r}."
                )
            changes[setting] = value
    recipe = known[name]
    return dataclasses.replace(recipe, **changes) if changes else recipe


def check_integer(
    name: str, value: int, *, at_least: int, below: int | None = None
) -> None:
    integer = isinstance(value, numbers.Integral) and type(value) is not bool
    if integer and value >= at_least and (below is None or value < below):
        return
    limits = f">= {at_least}" + ("" if below is None else f" and < {below}")
    raise ValueError(
        f"{name} must be an integer {limits}. Received: {name}={value!r}"
    )


DATASETS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="cifar10",
            examples=50_000,
            input_shape=(32, 32, 3),
            num_classes=10,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2023, 0.1994, 0.2010),
            augmentation="pad_crop_flip",
            validation=5_000,
        ),
        Recipe(
            name="cifar100",
            examples=50_000,
            input_shape=(32, 32, 3),
            num_classes=100,
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
            augmentation="resized_crop_flip",
            validation=5_000,
        ),
        Recipe(
            name="mnist",
            examples=60_000,
            input_shape=(28, 28, 1),
            num_classes=10,
            mean=(0.1307,),
            std=(0.3081,),
            augmentation="none",
            validation=6_000,
        ),
        Recipe(
            name="digits",
            examples=1_617,
            input_shape=(8, 8, 1),
            num_classes=10,
            mean=(0.3054,),  # of the 1,437 training images
            std=(0.3753,),
            augmentation="none",
            validation=180,
        ),
    )
}
TEXTS: dict[str, TextRecipe] = {
    recipe.name: recipe
    for recipe in (
        TextRecipe(
            name="python_docs",
            vocabulary=len(SYMBOLS),
            context=256,
            validation=65_536,
            test=65_536,
        ),
    )
}
