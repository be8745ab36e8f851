"""What rigl_keras needs, by requirements.txt; pyproject.toml has the rest."""

import re
from pathlib import Path

from setuptools import setup


def requirements():
    """Returns the ranges of requirements.txt, `{name in brackets: [line]}`."""
    text = Path(__file__).with_name("requirements.txt").read_text("utf-8")
    found, name = {}, None
    for line in text.splitlines():
        heading = re.match(r"# \[(\w+)\]", line)
        if heading:
            name = heading[1]
        elif not line:
            name = None
        elif name is not None and not line.startswith("#"):
            found.setdefault(name, []).append(line.split("#")[0].strip())
    return found


extras = requirements()
setup(install_requires=extras.pop("library"), extras_require=extras)
