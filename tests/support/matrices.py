"""Chooses some cases of a matrix of parameters."""


def in_turn(*axes):
    """Returns names of cases in which each value of each axis occurs.

    A shorter axis starts again.

    >>> in_turn(["a", "b", "c"], ["1", "2"])
    ['a-1', 'b-2', 'c-1']
    """
    axes = [list(axis) for axis in axes]
    return [
        "-".join(str(axis[i % len(axis)]) for axis in axes)
        for i in range(max(map(len, axes)))
    ]
