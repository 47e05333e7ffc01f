"""What holds for all tests."""

from __future__ import annotations

import signal

import hypothesis

# How long an example takes says more of what else the machine does than of the code.
hypothesis.settings.register_profile("chaccu", deadline=None)
hypothesis.settings.load_profile("chaccu")

# A shell that starts the tests in the background has them ignore Ctrl-C, and so their processes, which are ended by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
