"""Downloads that are checked, shown, resumed, and never left half-written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pooch
import requests
from tqdm import tqdm

TIMEOUT_SECONDS = 30.0
ATTEMPTS = 3
_CHUNK = 1 << 16


class DownloadError(OSError):
    """No mirror gave the file; the message says what each did and what can be done by hand."""


@dataclass(frozen=True)
class RemoteFile:
    """A published file: its name, the checksum it is known by, and where it can be had."""

    name: str
    known_hash: str
    """as pooch writes it: ``"sha256:..."`` or ``"md5:..."``"""
    mirrors: Sequence[str]
    """full addresses, tried in this order"""


class _InterruptedError(Exception):
    """The transfer stopped; what has arrived is kept."""


def _size_by_range(response: requests.Response) -> int | None:
    """Return the size of the whole file as a partial answer tells it."""
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(total) if total.isdigit() else None


def _transfer(url: str, part: Path, show_progress: bool, timeout_seconds: float) -> None:
    """Fetch what ``part`` does not hold yet; raise _InterruptedError if that stops early."""
    held = part.stat().st_size if part.exists() else 0
    # identity: a compressed transfer would be unpacked here, and the checksum is of the file itself
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={held}-"} if held else {})
    try:
        with requests.get(url, headers=headers, stream=True, timeout=timeout_seconds) as response:
            if response.status_code == requests.codes.requested_range_not_satisfiable:
                part.unlink()
                raise _InterruptedError(f"{held} bytes were held, more than there are")
            response.raise_for_status()
            if response.status_code == requests.codes.partial_content:
                size = _size_by_range(response)
            else:  # the server sends all of it, asked or not
                held = 0
                length = response.headers.get("Content-Length", "")
                size = int(length) if length.isdigit() else None
            with (
                open(part, "ab" if held else "wb") as file,
                tqdm(
                    total=size,
                    initial=held,
                    unit="B",
                    unit_scale=True,
                    desc=part.stem,
                    disable=None if show_progress else True,
                    leave=False,
                ) as bar,
            ):
                for chunk in response.iter_content(_CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
    except requests.HTTPError as error:
        raise DownloadError(str(error)) from None
    except requests.RequestException as error:
        raise _InterruptedError(str(error)) from error
    arrived = part.stat().st_size
    if size is not None and arrived != size:
        raise _InterruptedError(f"{arrived} of {size} bytes arrived")


class _Resumable:
    """A downloader for pooch that goes on where an earlier one stopped."""

    def __init__(self, show_progress: bool, timeout_seconds: float) -> None:
        self._show_progress, self._timeout_seconds = show_progress, timeout_seconds

    def __call__(self, url: str, output_file: Any, pooch_: Any, check_only: bool = False) -> None:
        # pooch hands over a temporary file that it deletes when anything fails. What has arrived is
        # kept beside it, and moved there once it is complete.
        name = pooch.utils.unique_file_name(url)
        part = Path(output_file).parent / f"{name}.part"
        for attempt in range(ATTEMPTS):
            try:
                _transfer(url, part, self._show_progress, self._timeout_seconds)
                break
            except _InterruptedError as error:
                if attempt == ATTEMPTS - 1:
                    raise DownloadError(str(error)) from None
        os.replace(part, output_file)


def fetch(
    file: RemoteFile,
    cache: Path,
    *,
    show_progress: bool = True,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Path:
    """Return the path of a published file in the cache, downloaded if it is not there yet.

    Parameters
    ----------
    file : RemoteFile
    cache : Path
        Folder; made if it is not there.
    show_progress : bool
        A progress bar, on a terminal.
    timeout_seconds : float
        A server that sends nothing for so long is given up; the next attempt goes on from there.

    Returns
    -------
    Path
        A file with the known checksum. One with another checksum, in the cache or from a mirror,
        is not kept.

    Raises
    ------
    DownloadError
        If no mirror gives that file.
    """
    failures = []
    downloader = _Resumable(show_progress, timeout_seconds)
    for url in file.mirrors:
        try:
            return Path(
                pooch.retrieve(url, file.known_hash, file.name, path=cache, downloader=downloader)
            )
        except (DownloadError, ValueError) as error:  # pooch: ValueError for a wrong checksum
            wrong = "the checksum is wrong" if isinstance(error, ValueError) else str(error)
            failures.append(f"  {url}: {wrong}")
    raise DownloadError(
        f"could not download {file.name}:\n" + "\n".join(failures) + "\n"
        f"What has arrived is kept in {cache}: try again later. Or get the file by other means "
        f"(its checksum is {file.known_hash}), put it into a folder, and name that folder as "
        "data_home or in the environment variable NALAYER_DATA."
    )
