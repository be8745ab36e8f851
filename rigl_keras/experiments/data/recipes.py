"""How each data set is split, augmented and normalised."""

from __future__ import annotations

import dataclasses
import numbers

from rigl_keras.experiments.data.augmentation import AUGMENTATIONS

__all__ = ["check_integer"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What one dataset is and how its images are prepared.

    An image x in 0..255 reaches the model as (x / 255 - mean) / std.

    Args:
        name: the name `load` knows it by.
        input_shape: (height, width, channels) of an image.
        num_classes: labels are 0..num_classes - 1.
        mean: per channel, of images scaled to [0, 1].
        std: per channel, of images scaled to [0, 1], > 0.
        augmentation: of training images only. "none"; "pad_crop_flip": 4
            pixels of reflection around the image, a random crop of the
            image's own size, a random horizontal flip; or
            "resized_crop_flip": a random box of 8 to 100 % of the area,
            resized to the image's own size, and a random horizontal flip.
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
