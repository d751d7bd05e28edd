"""Downloading a file: it can be resumed, and ends with the whole file or with none."""

import http.client
import os
import urllib.error
import urllib.request

from . import files
from .errors import InputError, reason
from .logger import progress_bar

CHUNK = 1 << 16
TIMEOUT = 30  # seconds without data


def download_file(address, path, check):
    """Download a file to `path`, with a progress bar.

    The content is written to PATH.part, which is renamed once it is complete and checked. A later call resumes from
    what an interrupted one has left there.

    :param check: called with the path of the complete file. It raises InputError for a file that is not the right one.
    :raises InputError: if the file cannot be downloaded or written, or is not the right one, which is then removed.
    """
    part = f"{path}.part"
    try:
        files.make_dirs(files.dirname(path) or ".")
        _fetch(address, part)
    except (OSError, http.client.HTTPException) as e:
        cause = e.reason if type(e) is urllib.error.URLError else e
        if getattr(e, "code", None) == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            os.remove(part)  # longer than the file at the address, so not a part of it
        advice = ": run this again to resume" if os.path.exists(part) else ""
        raise InputError(f"{address}: cannot be downloaded to {path} ({reason(cause)}){advice}") from None
    try:
        check(part)
    except InputError as e:
        os.remove(part)
        raise InputError(f"{address}: refused: {e}") from None
    os.replace(part, path)


def _fetch(address, part):
    """Complete the file `part`. A server that does not offer ranges sends the whole file again."""
    # From the last byte that is there: for none after the last byte of all, a server would answer with an error.
    start = max(0, os.path.getsize(part) - 1) if os.path.exists(part) else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        resumed = response.status == http.client.PARTIAL_CONTENT
        start = start if resumed else 0
        length = response.headers["Content-Length"]
        total = start + int(length) if length else None  # None: unknown
        bar = progress_bar(total=total, initial=start, desc=os.path.basename(address), unit="B", unit_scale=True)
        with bar, open(part, "r+b" if resumed else "wb") as f:
            f.seek(start)
            while chunk := response.read1(CHUNK):
                f.write(chunk)
                bar.update(len(chunk))
            f.flush()
            os.fsync(f.fileno())
    size = os.path.getsize(part)
    if size > (total or size):
        os.remove(part)  # another process wrote to it, or the file at the address has changed
    if size != (total or size):
        raise OSError(f"it has {total:,} bytes, of which {size:,} arrived")
