"""Counts how many of thirty random breaks of the core the tests catch.

    bin/python tests/breaks.py [--count=30] [--seed=0] [--all]
        [--near] [--first=1]

Each break changes one operator, number, truth or call of one line, in a copy
of the tracked files. The tests of the module run first, then, without `--near`,
all others; slow tests run only with `--all`. They stop at the first test that
fails with the break but not without it. Some breaks change nothing that a test
could see, so the script prints all breaks that were not caught.
"""

import argparse
import ast
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time

from support.fresh import Server

ROOT = pathlib.Path(__file__).parents[1]
LIMIT = 3600  # seconds: a break may make a loop endless

# The modules of the core, and their tests in the order in which they run.
TESTS = {
    "topology.py": "topology redistribution mask_updates callbacks parity",
    "redistribution.py": (
        "redistribution mask_updates callbacks parity setups growth"
    ),
    "schedules.py": (
        "schedules pruning mask_updates callbacks contract setups growth"
    ),
    "distributions.py": "distributions sparsify parity",
    "masking/masked.py": (
        "layers reading_kernels kinds custom_models masked_in_place sparsify "
        "density_one"
    ),
    "masking/tracing.py": (
        "reading_kernels layers callbacks method_arguments mask_updates "
        "density_one"
    ),
    "training/": (
        "optimizer_state mask_updates callbacks fit_runs train_steps setups "
        "growth custom_loops resumed_window"
    ),
    "methods/": (
        "methods mask_updates callbacks method_arguments pruning one_shot "
        "setups growth contract parity"
    ),
}

OPERATORS = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}
NAMES = {
    "min": "max",
    "max": "min",
    "minimum": "maximum",
    "maximum": "minimum",
    "any": "all",
    "all": "any",
    "reduce_any": "reduce_all",
    "reduce_all": "reduce_any",
    "zeros_like": "ones_like",
    "ones_like": "zeros_like",
    "logical_and": "logical_or",
    "logical_or": "logical_and",
}


def possible_breaks(source):
    """Returns `[(line, start, end, replacement)]`, columns in characters."""
    found, lines = [], source.splitlines()

    def between(one, two, operator):
        old, new = OPERATORS[type(operator)]
        if one.end_lineno != two.lineno:
            return
        gap = lines[two.lineno - 1][one.end_col_offset : two.col_offset]
        at = re.search(rf"(?<!\w){re.escape(old)}(?!\w)", gap)
        if at:
            start = one.end_col_offset + at.start()
            found.append((two.lineno, start, start + len(old), new))

    def replace(node, new):
        if node.lineno == node.end_lineno:
            found.append(
                (node.lineno, node.col_offset, node.end_col_offset, new)
            )

    def visit(node):
        if isinstance(node, ast.Raise):
            return  # tests need not check the wording of errors
        if isinstance(node, ast.keyword) and node.arg == "strict":
            return  # zip's `strict`, for arguments of equal length
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            between(node.left, node.comparators[0], node.ops[0])
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            if not isinstance(node.left, ast.Constant) or not isinstance(
                node.left.value, str
            ):
                between(node.left, node.right, node.op)
        elif isinstance(node, ast.BoolOp):
            between(*node.values[:2], node.op)
        elif isinstance(node, ast.UnaryOp) and isinstance(
            node.op, ast.Not | ast.USub
        ):
            replace(node, f"({ast.unparse(node.operand)})")
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, bool):
                replace(node, str(not node.value))
            elif isinstance(node.value, int | float):
                replace(node, repr(node.value + 1))
        elif isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            if name in NAMES and node.lineno == node.end_lineno:
                end = node.end_col_offset
                found.append((node.lineno, end - len(name), end, NAMES[name]))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            replace(node, "pass")
        for field, value in ast.iter_fields(node):
            # Not in annotations.
            if field not in ("annotation", "returns"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        visit(child)

    visit(ast.parse(source))
    return [b for b in found if lines[b[0] - 1].isascii()]


def drawn(package, count, seed):
    """Returns random breaks, `[(path, break)]`; each line is equally likely."""
    by_line = {}
    for place in TESTS:
        paths = [package / place]
        if place.endswith("/"):
            paths = sorted((package / place).glob("*.py"))
        for path in paths:
            for change in possible_breaks(path.read_text()):
                by_line.setdefault((path, change[0]), []).append(change)
    draw = random.Random(seed)
    chosen = draw.sample(sorted(by_line), count)
    return [(path, draw.choice(by_line[path, line])) for path, line in chosen]


def broken(source, change):
    """Returns the source with a break, and the line without and with it."""
    line, start, end, new = change
    lines = source.splitlines(keepends=True)
    old = lines[line - 1]
    lines[line - 1] = old[:start] + new + old[end:]
    return "".join(lines), old.strip(), lines[line - 1].strip()


def copied(folder):
    """Copies the files that git tracks; returns the folder."""
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
    )
    for name in tracked.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def tests_of(path, package):
    name = path.relative_to(package).as_posix()
    (names,) = (TESTS[place] for place in TESTS if name.startswith(place))
    return [f"tests/test_{name}.py" for name in names.split()]


def all_tests(copy):
    return [
        file.relative_to(copy).as_posix()
        for file in (copy / "tests").glob("test_*.py")
    ]


def first_failure(server, copy, *arguments):
    """Returns the name of the first test that fails, or None."""
    try:
        done = server(
            *["-m", "pytest", "-n0", "-x", "-p", "no:cacheprovider", "-rfE"],
            *arguments,
            cwd=copy,
            env={"PYTHONPATH": str(copy)},  # for processes that tests start
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return "a test that does not end"
    found = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - |$)", done.stdout, re.M)
    if found:
        return found[1]
    return f"pytest, with {done.returncode}" if done.returncode else None


def what_catches(server, copy, path, text, files, known, options):
    """Returns the first test that fails with a text, and not without it.

    `known` are tests that fail without it, too. This function adds to them.
    """
    source = path.read_text()
    while True:
        path.write_text(text)
        ignored = [f"--deselect={name}" for name in sorted(known)]
        found = first_failure(server, copy, *files, *ignored, *options)
        path.write_text(source)
        if found is None or not found.startswith("tests/"):
            return found
        alone = [found] if "::" in found else [found, "--collect-only"]
        if not first_failure(server, copy, *alone):
            return found
        if "::" not in found:
            sys.exit(f"{found} cannot be read, unbroken.")
        known.add(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="Slow tests, too.")
    parser.add_argument(
        "--near",
        action="store_true",
        help="Only tests that know the module: others may catch more.",
    )
    parser.add_argument(
        "--first", type=int, default=1, help="The break to begin with, from 1."
    )
    flags = parser.parse_args()
    options = ["--all"] if flags.all else []
    server, known, caught, tried = Server(), set(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(pathlib.Path(folder))
        package = copy / "rigl_keras"
        breaks = drawn(package, flags.count, flags.seed)
        for number, (path, change) in enumerate(breaks, 1):
            if number < flags.first:
                continue
            start = time.monotonic()
            text, old, new = broken(path.read_text(), change)
            files = tests_of(path, package)
            found = what_catches(
                server, copy, path, text, files, known, options
            )
            if found is None and not flags.near:
                others = sorted(set(all_tests(copy)) - set(files))
                found = what_catches(
                    server, copy, path, text, others, known, options
                )
            tried += 1
            caught += found is not None
            print(
                f"{number:2d} {path.relative_to(package)}:{change[0]}\n"
                f"   - {old}\n   + {new}\n"
                f"   {found or 'NOT CAUGHT'} "
                f"({time.monotonic() - start:.0f} s)",
                flush=True,
            )
    server.close()
    print(f"{caught} of {tried} are caught.")
    if known:
        print("These fail unbroken:", *sorted(known), sep="\n  ")
    sys.exit(bool(known))


if __name__ == "__main__":
    main()
