"""What several test modules share. None of them imports another."""

import pytest

# As pytest does with test modules: an assert that fails shows its values.
pytest.register_assert_rewrite("support.disk", "support.regressions")
