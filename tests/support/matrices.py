"""Which cases of a matrix stand for all of them."""


def in_turn(*axes):
    """Returns names of cases in which each value of each axis comes once.

    An axis that is shorter begins again.

    >>> in_turn(["a", "b", "c"], ["1", "2"])
    ['a-1', 'b-2', 'c-1']
    """
    axes = [list(axis) for axis in axes]
    return [
        "-".join(str(axis[i % len(axis)]) for axis in axes)
        for i in range(max(map(len, axes)))
    ]
