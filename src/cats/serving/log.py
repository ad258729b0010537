"""One line for each request, text or JSON. Prompts and answers are in none."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

logger = logging.getLogger("cats.serving")


class JsonFormatter(logging.Formatter):
    """A log record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def set_up(*, as_json: bool) -> None:
    """Write the log of the server to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    )
    for name in ("cats.serving", "uvicorn"):
        own = logging.getLogger(name)
        own.handlers = [handler]
        own.setLevel(logging.INFO if name == "cats.serving" else logging.WARNING)
        own.propagate = False


def log_request(fields: dict[str, Any]) -> None:
    """Log one request.

    Args:
        fields: Method, path, status, seconds, and what the route has added.
    """
    shown = dict(fields)
    text = f"{shown.pop('method')} {shown.pop('path')} {shown.pop('status')}"
    details = " ".join(f"{name}={value}" for name, value in shown.items() if value is not None)
    logger.info("%s %s", text, details, extra={"fields": {"event": "request", **fields}})
