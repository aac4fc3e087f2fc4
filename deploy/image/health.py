"""The health check of a container: exits with 0 if the process in it is ready, else with 1 and why it is not.

It asks `/health/ready` at the port that the process listens on. It imports nothing of Mercato, for it runs every few
seconds.
"""

from __future__ import annotations

import http.client
import os
import sys

SECONDS = 3.0


def main() -> None:
    port = int(os.environ.get("MERCATO_LISTEN_PORT") or 8080)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request("GET", "/health/ready")
        answer = connection.getresponse()
        text = answer.read().decode(errors="replace")
    except OSError as error:
        sys.exit(f"port {port} does not answer: {error}")
    if answer.status != http.client.OK:
        sys.exit(f"not ready: {text.strip()}")


if __name__ == "__main__":
    main()
