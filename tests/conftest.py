"""What holds for all tests."""

from __future__ import annotations

import hypothesis

# How long an example takes says more of what else the machine does than of the code.
hypothesis.settings.register_profile("chaccu", deadline=None)
hypothesis.settings.load_profile("chaccu")
