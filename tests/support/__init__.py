"""Code that test modules share. Test modules do not import each other."""

import pytest

# Makes failing asserts show their values, as in test modules.
pytest.register_assert_rewrite(
    "support.compacted",
    "support.disk",
    "support.epilogues",
    "support.hostile",
    "support.hostile_masks",
    "support.hostile_numbers",
    "support.regressions",
    "support.searches",
)
