"""Whether the hub can be reached, found out before it is asked for weights.

Without a network huggingface_hub tries each of its requests six times over half a minute and tells of every try. So
one connection is tried first, with a timeout that is long enough for slow networks.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants

_PATIENCE_SECONDS = 15.0
_TRIES = 2


@contextmanager
def cache_alone_if_unreachable() -> Iterator[str]:
    """Inside, the hub's library uses only its cache if the hub cannot be reached. Yields the reason, or "" if it can
    be reached or HF_HUB_OFFLINE is set."""
    offline = constants.HF_HUB_OFFLINE
    fault = "" if offline else unreachable(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = offline or bool(fault)
    try:
        yield fault
    finally:
        constants.HF_HUB_OFFLINE = offline


def unreachable(address: str) -> str:
    """Why there is no connection to the server at an address such as https://HOST, or to the proxy in between; "" if
    there is one."""
    server = urlsplit(address)
    proxy = "" if proxy_bypass(server.hostname or "") else getproxies().get(server.scheme, "")
    if proxy:
        server = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    try:
        host, port = server.hostname or "", server.port or (80 if server.scheme == "http" else 443)
    except ValueError as error:
        return f"{error}: correct HTTPS_PROXY or HF_ENDPOINT"
    fault = ""
    for attempt in range(_TRIES):
        time.sleep(attempt)
        try:
            socket.create_connection((host, port), timeout=_PATIENCE_SECONDS).close()
        except (OSError, UnicodeError) as error:
            fault = f"no connection to {host}: {getattr(error, 'strerror', None) or error}"
        else:
            return ""
    return fault
