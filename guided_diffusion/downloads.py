"""Resumable downloads. The destination file appears only when its download is complete and checked."""

import http.client
import os
import urllib.error
import urllib.request

from . import files
from .errors import InputError, reason
from .logger import progress_bar

CHUNK = 1 << 16
TIMEOUT = 30  # seconds without data after which a download fails


def download_file(address, path, check):
    """Download the file at `address` to `path`, with a progress bar.

    The content is written to PATH.part, which is renamed to PATH when the download is complete and checked. If a
    download is interrupted, the next call resumes from PATH.part.

    :param check: a function that is called with the path of the complete file, and raises InputError for a wrong file.
    :raises InputError: if the file cannot be downloaded or written, or fails the check. A file that fails is removed.
    """
    part = f"{path}.part"
    try:
        files.make_dirs(files.dirname(path) or ".")
        _fetch(address, part)
    except (OSError, http.client.HTTPException) as e:
        cause = e.reason if type(e) is urllib.error.URLError else e
        if getattr(e, "code", None) == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            os.remove(part)  # PATH.part is longer than the file at the address, so it is a part of another file
        advice = ": run this again to resume" if os.path.exists(part) else ""
        raise InputError(f"{address}: cannot be downloaded to {path} ({reason(cause)}){advice}") from None
    try:
        check(part)
    except InputError as e:
        os.remove(part)
        raise InputError(f"{address}: refused: {e}") from None
    os.replace(part, path)


def _fetch(address, part):
    """Download the missing part of the file `part`. A server without byte ranges sends the whole file again."""
    # Request the last byte again: if `part` is already complete, a request beyond the last byte would be an error.
    start = max(0, os.path.getsize(part) - 1) if os.path.exists(part) else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        resumed = response.status == http.client.PARTIAL_CONTENT
        start = start if resumed else 0
        length = response.headers["Content-Length"]
        total = start + int(length) if length else None  # None if the server does not tell the length
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
        os.remove(part)  # another process wrote to PATH.part, or the file at the address has changed
    if size != (total or size):
        raise OSError(f"the file has {total:,} bytes, of which {size:,} arrived")
