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
        advice = ": run this again to resume" if os.path.exists(part) else ""
        raise InputError(f"{address}: cannot be downloaded to {path} ({reason(e)}){advice}") from None
    try:
        check(part)
    except InputError as e:
        os.remove(part)
        raise InputError(f"{address}: refused: {e}") from None
    os.replace(part, path)


def _fetch(address, part):
    """Append to the file `part` what it lacks. A server that does not offer ranges sends the whole file again."""
    start = os.path.getsize(part) if os.path.exists(part) else 0
    with _request(address, start) as response:
        resumed = response.status in (206, 416)
        length = response.headers.get("Content-Range", "").rpartition("/")[2] or response.headers["Content-Length"]
        total = int(length) if length and length.isdigit() else None  # None: unknown
        options = dict(desc=os.path.basename(address), unit="B", unit_scale=True)
        bar = progress_bar(total=total, initial=start if resumed else 0, **options)
        with bar, open(part, "ab" if resumed else "wb") as f:
            while response.status != 416 and (chunk := response.read1(CHUNK)):  # 416: nothing is missing
                f.write(chunk)
                bar.update(len(chunk))
            f.flush()
            os.fsync(f.fileno())
    size = os.path.getsize(part)
    if size > (total or size):
        os.remove(part)  # another process wrote to it, or the file at the address is another one now
    if size != (total or size):
        raise OSError(f"it has {total:,} bytes, of which {size:,} arrived")


def _request(address, start):
    """Ask for the content from byte `start`. Status 416 is returned like the others: there is none after `start`."""
    request = urllib.request.Request(address, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        if e.code == 416:
            return e
        raise
