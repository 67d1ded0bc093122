"""The server's log: one line of JSON for each event, without anything of prompts or answers."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import TextIO

log = logging.getLogger("phatgoose.serve")


class JsonFormatter(logging.Formatter):
    """Writes time, level, event, the record's `facts`, and where an error came from."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage().strip()
        if message.startswith("Traceback "):
            # A library logged a whole traceback as its message. The last line says what went wrong.
            message = message.rpartition("\n")[2]
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": message,
            **getattr(record, "facts", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            # Only the error's type and the places: its message may repeat what a client sent.
            kind, said = record.exc_info[0].__name__, str(record.exc_info[1])
            line["event"] = message.replace(said, kind) if said else message
            line["error"] = kind
            frames = traceback.extract_tb(record.exc_info[2])
            line["at"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames][-12:]
        return json.dumps(line, ensure_ascii=False)


def set_up(stream: TextIO | None = None) -> None:
    """Logs to standard error: the server's events, uvicorn's warnings, and errors of transformers' loop."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name, level in (
        ("phatgoose.serve", logging.INFO),
        ("uvicorn.error", logging.WARNING),
        ("ContinuousBatchingLogger", logging.ERROR),
    ):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
