"""What a command says of itself: its name, its help, a flag that is wrong.

Nothing here needs TensorFlow, so that `--help` answers at once.
"""

import ast
import difflib
import importlib.util
import re
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from absl import flags

__all__ = [
    "about_module",
    "asks_for_help",
    "called",
    "flag_error",
    "help_text",
    "repeated",
]

_WIDTH = 80
_INDENT = 6
_HELP = ("--help", "-help", "-h", "--helpshort", "--helpfull", "-?")
_VALUES = {
    "int": "N",
    "float": "X",
    "comma separated list of strings": "A,B,...",
}


def called(name: str) -> str:
    """Returns what a user types to call a command.

    Args:
        name: Name of the command, such as "train".

    Returns:
        `bin/train`, or `rigl-train` where that was called.
    """
    first, *rest = name.split(" ")
    script = Path(sys.argv[0]).name
    first = script if script.startswith("rigl-") else f"bin/{first}"
    return " ".join([first, *rest])


def repeated(name: str, added: Sequence[str] = ()) -> str:
    """Returns the command line of this process, as a user types it.

    Args:
        name: Name of the command.
        added: Flags to add, where they are not there.
    """
    words = sys.argv[1:]
    added = [word for word in added if word not in words]
    words = [shlex.quote(word) for word in [*words, *added]]
    return " ".join([called(name.split(" ")[0]), *words])


def asks_for_help(argv: Sequence[str]) -> bool:
    """Returns whether one of the words of a command line asks for help."""
    words = list(argv[1:])
    if "--" in words:
        words = words[: words.index("--")]
    return any(word in _HELP for word in words)


def about_module(name: str) -> str:
    """Returns the docstring of a module, which is not imported.

    Args:
        name: Full name of the module.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return ""
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or ""


def help_text(name: str, about: str) -> str:
    """Returns what `--help` prints: at most 80 columns, and our own flags.

    Args:
        name: Name of the command.
        about: What it does, with examples that begin with `bin/`.
    """
    if called(name).startswith("rigl-"):
        about = re.sub(
            r"\bbin/(\w+)", lambda m: f"rigl-{m[1].replace('_', '-')}", about
        )
    lines = [about.strip(), "", "Options:"]
    for flag in _own_flags():
        lines += _option(flag)
    return "\n".join([*lines, "  --help", "      Print this, and stop."])


def flag_error(error: flags.Error) -> str:
    """Returns what is wrong with a flag, and which one may have been meant."""
    if not isinstance(error, flags.UnrecognizedFlagError):
        return f"{str(error).strip().rstrip('.')}."
    names = [flag.name for flag in _own_flags()]
    near = difflib.get_close_matches(error.flagname, names, n=1)
    hint = f" Did you mean --{near[0]}?" if near else ""
    return f"There is no flag --{error.flagname}.{hint}"


def _own_flags():
    """Returns the flags of the command, in the order they were defined."""
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if module == sys.argv[0] or module.split(".")[0] == "rigl_keras":
            yield from (f for f in defined if not _is_alias(f))


def _is_alias(flag):
    return flag.help.startswith("Alias for --")


def _option(flag):
    """Returns the lines of one flag."""
    kind = flag.flag_type()
    head = f"--{flag.name}"
    if kind == "bool":
        head = f"--[no]{flag.name}"
    elif kind == "string enum":
        head += f"={'|'.join(flag.parser.enum_values)}"
    else:
        head += f"={_VALUES.get(kind, 'TEXT')}"
    # absl adds what it thinks of enums and of flags that may be repeated.
    said = re.sub(r"^<[^>]*>: |\s*;\s*repeat this.*", "", flag.help, flags=re.S)
    default = _default(flag)
    if default:
        said += f" ({default})"
    return [
        *textwrap.wrap(
            head,
            _WIDTH,
            initial_indent="  ",
            subsequent_indent=" " * _INDENT,
            break_on_hyphens=False,
        ),
        *textwrap.wrap(
            said,
            _WIDTH,
            initial_indent=" " * _INDENT,
            subsequent_indent=" " * _INDENT,
            break_on_hyphens=False,
        ),
    ]


def _default(flag):
    """Returns what to say of a flag's default, which may be nothing."""
    if flag.flag_type() == "bool":
        return "default: yes" if flag.default else ""
    if flag.flag_type().startswith("multi"):
        return "may be repeated"
    if flag.default in (None, "", []):
        return ""
    value = flag.default
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return f"default: {value}"
