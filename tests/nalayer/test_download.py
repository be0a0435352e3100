"""Downloads from a local server that truncates, corrupts, stalls, redirects and refuses."""

import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from pooch.utils import unique_file_name
from tqdm import tqdm

from nalayer import download
from nalayer.download import ATTEMPTS, DownloadError, RemoteFile, fetch

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
TIMEOUT = 0.5


class Server(ThreadingHTTPServer):
    """Serves CONTENT under every path; the path's first part names what goes wrong."""

    daemon_threads = True

    def __init__(self) -> None:
        self.requests: list[tuple[str, str | None]] = []
        super().__init__(("127.0.0.1", 0), Handler)

    def url(self, trouble: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{trouble}/data.bin"

    def ranges(self, trouble: str) -> list[str | None]:
        return [asked for path, asked in self.requests if path == f"/{trouble}/data.bin"]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        trouble = self.path.split("/")[1]
        asked = self.headers.get("Range")
        self.server.requests.append((self.path, asked))
        if trouble == "missing":
            self.send_error(404)
            return
        if trouble == "moved":
            self.send_response(302)
            self.send_header("Location", "/well/data.bin")
            self.end_headers()
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if trouble == "no-ranges":
            start = 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        data = CONTENT[start:]
        if trouble == "corrupt":
            data = bytes([data[0] ^ 1]) + data[1:]
        partial = asked and trouble != "no-ranges"
        self.send_response(206 if partial else 200)
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        first_time = len(self.server.ranges(trouble)) == 1
        if trouble == "truncates" or (trouble in ("truncates-once", "no-ranges") and first_time):
            self.wfile.write(data[: len(data) // 2])
        elif trouble == "stalls-once" and first_time:
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            time.sleep(3 * TIMEOUT)
        else:
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def get(server: Server, cache, *troubles: str, known_hash: str = SHA256):
    mirrors = [server.url(trouble) for trouble in troubles]
    return fetch(RemoteFile("data.bin", known_hash, mirrors), cache, timeout_seconds=TIMEOUT)


@pytest.mark.parametrize("trouble", ["well", "moved", "truncates-once", "no-ranges", "stalls-once"])
def test_the_whole_file_arrives_and_is_asked_for_once(server, tmp_path, trouble):
    path = get(server, tmp_path / "cache", trouble)
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    n_requests = len(server.requests)
    assert get(server, tmp_path / "cache", trouble) == path
    assert len(server.requests) == n_requests


@pytest.mark.parametrize("trouble", ["truncates-once", "stalls-once"])
def test_an_interrupted_transfer_goes_on_where_it_stopped(server, tmp_path, trouble):
    get(server, tmp_path, trouble)
    whole, rest = server.ranges(trouble)
    assert whole is None
    assert rest is not None
    # All that was sent is used, but for a last piece that was not yet written.
    lost = len(CONTENT) // 2 - int(rest.removeprefix("bytes=").rstrip("-"))
    assert 0 <= lost < 2**16


def part_of(server: Server, cache, trouble: str):
    """Return where an interrupted transfer from that address is kept."""
    return cache / f"{unique_file_name(server.url(trouble))}.part"


def test_progress_counts_every_byte_and_goes_on_from_what_was_held(server, tmp_path, monkeypatch):
    bars: list[dict] = []

    class Bar(tqdm):
        def __init__(self, **settings):
            bars.append(settings | {"seen": 0})
            super().__init__(**settings)

        def update(self, n=1):
            bars[-1]["seen"] += n
            return super().update(n)

    monkeypatch.setattr(download, "tqdm", Bar)
    get(server, tmp_path, "truncates-once")
    first, second = bars
    assert first["total"] == second["total"] == len(CONTENT)
    assert 0 == first["initial"] < first["seen"] == second["initial"]
    assert second["initial"] + second["seen"] == len(CONTENT)
    assert first["disable"] is None  # shown on a terminal


def test_what_a_killed_download_left_is_used(server, tmp_path):
    with pytest.raises(DownloadError):
        get(server, tmp_path, "truncates")
    part = part_of(server, tmp_path, "truncates")
    assert list(tmp_path.iterdir()) == [part]
    held = part.read_bytes()
    assert len(CONTENT) // 2 < len(held) < len(CONTENT)
    part.rename(part_of(server, tmp_path, "well"))  # as if the server had recovered
    assert get(server, tmp_path, "well").read_bytes() == CONTENT
    assert server.ranges("well") == [f"bytes={len(held)}-"]


def test_a_wrong_checksum_is_not_kept_and_the_next_mirror_is_tried(server, tmp_path):
    path = get(server, tmp_path, "corrupt", "missing", "truncates", "well")
    assert path.read_bytes() == CONTENT
    with pytest.raises(DownloadError):
        get(server, tmp_path / "other", "corrupt")
    assert list((tmp_path / "other").iterdir()) == []


def test_a_file_in_the_cache_that_was_altered_is_fetched_again(server, tmp_path):
    path = get(server, tmp_path, "well")
    path.write_bytes(CONTENT[:-1])
    assert get(server, tmp_path, "well").read_bytes() == CONTENT


def test_a_longer_rest_than_the_file_is_thrown_away(server, tmp_path):
    part_of(server, tmp_path, "well").write_bytes(CONTENT + b"more")
    assert get(server, tmp_path, "well").read_bytes() == CONTENT


def test_the_error_says_what_every_mirror_did_and_what_to_do(server, tmp_path):
    with pytest.raises(DownloadError) as raised:
        get(server, tmp_path, "missing", "corrupt", "truncates")
    words = str(raised.value)
    assert "could not download data.bin" in words
    assert f"{server.url('missing')}: 404" in words
    assert f"{server.url('corrupt')}: the checksum is wrong" in words
    assert server.url("truncates") in words
    assert "NALAYER_DATA" in words
    assert SHA256 in words
    assert len(server.ranges("truncates")) == ATTEMPTS
    assert not (tmp_path / "data.bin").exists()


def test_a_server_that_is_not_there(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(DownloadError, match="Connection refused"):
        get(server, tmp_path, "well")
