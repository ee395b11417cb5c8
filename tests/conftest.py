"""What all tests run with."""

from __future__ import annotations

import signal

from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")  # --hypothesis-profile=default draws other examples each time


def pytest_configure() -> None:
    """Let the signals that tests send arrive: who runs them may ignore some, as nohup and `&` do."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
