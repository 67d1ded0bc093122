"""One line of JSON for each thing that happens. Nothing of prompts or answers is ever in it."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

log = logging.getLogger("phatgoose.serve")


class Lines(logging.Formatter):
    """time, level, event, what is known about it, and where an error came from."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": _event(record.getMessage().strip()),
            **getattr(record, "facts", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            # The kind and the places only: an exception's message may repeat what a client said.
            kind, message = record.exc_info[0].__name__, str(record.exc_info[1])
            line["event"] = line["event"].replace(message, kind) if message else line["event"]
            line["error"] = kind
            line["at"] = self._places(record.exc_info[2])
        return json.dumps(line, ensure_ascii=False)

    @staticmethod
    def _places(traceback: object) -> list[str]:
        found = []
        while traceback is not None:
            code = traceback.tb_frame.f_code  # type: ignore[attr-defined]
            found.append(f"{code.co_filename}:{traceback.tb_lineno} {code.co_name}")  # type: ignore[attr-defined]
            traceback = traceback.tb_next  # type: ignore[attr-defined]
        return found[-12:]


def _event(message: str) -> str:
    """Of a traceback that a library logs as a message, its last line: what went wrong."""
    return message.rpartition("\n")[2] if message.startswith("Traceback ") else message


def set_up(stream: TextIO | None = None) -> None:
    """Writes the server's log, uvicorn's warnings, and what ends transformers' loop, to standard error."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(Lines())
    for name, level in (
        ("phatgoose.serve", logging.INFO),
        ("uvicorn.error", logging.WARNING),
        ("ContinuousBatchingLogger", logging.ERROR),
    ):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
