"""Downloads over bad lines: tried again after a pause, and resumed where they broke off."""

import time
from pathlib import Path

import requests

ATTEMPTS = 4
PAUSE = 1.0  # seconds before the second attempt, doubled before each later one
PATIENCE = 30  # seconds without a byte


def download(url: str, path: Path, largest: int) -> None:
    """Download what `path` still lacks of a file of at most `largest` bytes; what is in it afterwards is unverified.

    Raises OSError, of which requests' own errors are a kind, if no attempt comes to the end; `path` keeps what came.
    """
    for attempt in range(ATTEMPTS):
        try:
            return _attempt(url, path, largest)
        except requests.RequestException as error:
            refused = error.response is not None and 400 <= error.response.status_code < 500
            if attempt == ATTEMPTS - 1 or refused:
                raise
        time.sleep(PAUSE * 2**attempt)


def _attempt(url: str, path: Path, largest: int) -> None:
    there = path.stat().st_size if path.exists() else 0
    asked = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={there}-"} if there else {})
    with requests.get(url, headers=asked, stream=True, timeout=PATIENCE) as response:
        if there and response.status_code == requests.codes.requested_range_not_satisfiable:
            return  # nothing is lacking
        response.raise_for_status()
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {there}-")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab" if resumed else "wb") as file:
            for chunk in response.iter_content(1 << 16):
                if file.write(chunk) and file.tell() > largest:
                    raise OSError(f"{url} has more than {largest:,} bytes")
