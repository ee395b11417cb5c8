"""Log records: one line each, for people or for machines."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from sailfish.base import log


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    logger = logging.getLogger("sailfish")
    before = (logger.handlers, logger.level, logger.propagate)
    yield
    logger.handlers, logger.level, logger.propagate = before


def _logged(as_json: bool, message: str, *, fault: bool = False) -> str:
    stream = io.StringIO()
    log.configure(as_json=as_json, stream=stream)
    try:
        if fault:
            raise ValueError("inner")
        logging.getLogger("sailfish.room").info(message)
    except ValueError:
        logging.getLogger("sailfish.room").exception(message)
    return stream.getvalue()


def test_a_message_cannot_forge_a_second_line() -> None:
    assert _logged(False, "id\n12:00:00 ERROR forged").count("\n") == 1
    assert "\\x0a" in _logged(False, "a\nb")


def test_json_lines_hold_the_record() -> None:
    row = json.loads(_logged(True, 'say "hi"\nthere'))
    assert (row["level"], row["logger"], row["message"]) == ("info", "sailfish.room", 'say "hi"\nthere')
    assert row["time"].endswith("Z")


def test_a_fault_keeps_its_traceback() -> None:
    assert "ValueError: inner" in json.loads(_logged(True, "failed", fault=True))["traceback"]
    assert "ValueError: inner" in _logged(False, "failed", fault=True)


def test_records_below_the_level_are_dropped() -> None:
    stream = io.StringIO()
    log.configure(level="warning", stream=stream)
    logging.getLogger("sailfish.room").info("quiet")
    assert stream.getvalue() == ""
