"""A warning of methods that are for patterns, where masks have none."""

from collections.abc import Sequence

from rigl_keras._warn import warn

__all__ = ["warn_of_single_weights"]


def warn_of_single_weights(
    method: str, names: Sequence[str], rule: str, follows: str
) -> None:
    """Warns that masks have no pattern, if there are such masks.

    Args:
        method: Name of the method.
        names: Names of the layers with masks of single weights.
        rule: What the method is for, such as "is for N:M patterns".
        follows: What happens now, and the way out, in sentences.
    """
    if not names:
        return
    named = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    warn(
        f"{method} {rule}, but the masks of {named} are of single weights "
        f"(granularity='element'). {follows}"
    )
