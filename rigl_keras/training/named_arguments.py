"""Names the class and the argument where a method gets an unknown one."""

import difflib
import inspect
from typing import Any

import keras

__all__ = ["NamedArguments"]


class NamedArguments(keras.callbacks.Callback):
    """A callback whose class is named if an argument of it is misspelt.

    A method without arguments of its own has the constructor of a class above
    it, which Python would name instead.

    Raises:
        TypeError: An argument is unknown.
    """

    # Not in a class that has `__init__`: Python would read the arguments here.
    def __new__(cls, *args: Any, **arguments: Any):
        parameters = inspect.signature(cls.__init__).parameters.values()
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        known = [p.name for p in parameters][1:]
        for name in arguments:
            if name in known or takes_all:
                continue
            near = difflib.get_close_matches(name, known, n=1)
            hint = (
                f"Did you mean {near[0]!r}?"
                if near
                else f"There are: {', '.join(known)}."
            )
            raise TypeError(f"{cls.__name__} has no argument {name!r}. {hint}")
        return super().__new__(cls)
