"""Settings of every test, and the folder whose helpers (`make`) they share."""

import pytest
from hypothesis import settings

# No deadline: a busy machine isn't a failure. No randomness: the same examples every time.
settings.register_profile("fewbits", deadline=None, derandomize=True, max_examples=60, print_blob=False)
settings.load_profile("fewbits")

pytest.register_assert_rewrite("make")
