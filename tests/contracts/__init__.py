"""One suite per seam, for all that implement it."""

import pytest

pytest.register_assert_rewrite("tests.contracts.guest_channel_suite")
