"""An app with segment-analytics-python as it comes from PyPI; run by tests/test_sdks.py."""

import json
import logging
import sys
import time
from datetime import datetime
from typing import Any

from segment.analytics import Client

TASK: dict[str, Any] = json.load(sys.stdin)
FAILED: list[str] = []


def say(**what: object) -> None:
    sys.stdout.write(f"{json.dumps(what)}\n")
    sys.stdout.flush()


class Watch(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("Network error retry"):
            say(retrying=True)


def fail(error: Exception, batch: list[dict[str, Any]]) -> None:
    sys.stderr.write(f"{error}\n")
    FAILED.extend(message["messageId"] for message in batch)


def call(client: Any, kind: str, said: dict[str, Any]) -> None:
    # userId is user_id there, and so are the other ids.
    given = {name.replace("Id", "_id"): value for name, value in said.items()}
    if "timestamp" in given:
        given["timestamp"] = datetime.fromisoformat(given["timestamp"])
    getattr(client, kind)(**given)


def main() -> None:
    logging.getLogger("segment").setLevel(logging.DEBUG)
    client = Client(
        TASK["key"],
        host=TASK["host"],
        gzip=TASK["gzip"],
        upload_size=10,
        upload_interval=0.1,
        on_error=fail,
        log_handler=Watch(),
    )
    for kind, said in TASK["calls"]:
        call(client, kind, said)
        time.sleep(TASK["pace_s"])
    client.shutdown()
    acknowledged = [said["messageId"] for _, said in TASK["calls"]]
    acknowledged = [message_id for message_id in acknowledged if message_id not in FAILED]
    say(acknowledged=acknowledged, failed=FAILED)


main()
