"""A download survives a line that breaks, and nothing but the expected content arrives."""

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from phasegate.errors import UserError
from phasegate.files import sha256
from phasegate.sources import download, fashion_mnist, load_fashion_mnist

CONTENT = np.random.default_rng(0).bytes(1 << 18)


class Server(ThreadingHTTPServer):
    """Files over a bad line: the first `cuts` answers end half way."""

    cuts, ranges, status = 0, True, 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"/file": CONTENT}
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, content = self.server, self.server.files[self.path]
        server.asked.append(self.headers["Range"])
        start = int((self.headers["Range"] or "bytes=0-")[6:-1]) if server.ranges else 0
        if server.status or start >= len(content):
            return self.send_error(server.status or 416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        cut, server.cuts = server.cuts > 0, server.cuts - 1
        self.wfile.write(content[start : len(content) // 2] if cut else content[start:])
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "PAUSE", 0)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_breaks_half_way_is_resumed(server: Server, tmp_path: Path, ranges: bool) -> None:
    server.cuts, server.ranges = 1, ranges  # a server that ignores ranges sends all of it again
    download.download(f"{server.url}/file", tmp_path / "new" / "file", len(CONTENT))
    assert (tmp_path / "new" / "file").read_bytes() == CONTENT
    assert server.asked == [None, f"bytes={len(CONTENT) // 2}-"]


def test_a_complete_file_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    download.download(f"{server.url}/file", tmp_path / "file", len(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT and len(server.asked) == 1


@pytest.mark.parametrize(("status", "attempts"), [(404, 1), (503, download.ATTEMPTS)])
def test_what_may_pass_is_tried_again_and_what_stays_is_not(
    server: Server, tmp_path: Path, status: int, attempts: int
) -> None:
    server.status = status
    with pytest.raises(OSError, match=str(status)):
        download.download(f"{server.url}/file", tmp_path / "file", len(CONTENT))
    assert len(server.asked) == attempts and not (tmp_path / "file").exists()


def test_a_server_that_sends_without_end_is_stopped(server: Server, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="file has more than 65,536 bytes"):
        download.download(f"{server.url}/file", tmp_path / "file", 1 << 16)
    assert (tmp_path / "file").stat().st_size < len(CONTENT)


def test_fashion_mnist_arrives_over_a_bad_line_and_never_wrong(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "absent")
    monkeypatch.setattr(fashion_mnist, "URL", server.url)
    hashes = {}
    for name in fashion_mnist.SHA256:
        shape = [12, 28, 28] if "images" in name else [12]
        content = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes() + bytes(np.prod(shape))
        server.files[f"/{name}.gz"], hashes[name] = gzip.compress(content), sha256(content)
    server.cuts, local = 3, tmp_path / "fashion_mnist"
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz .* can't be downloaded \(other content\)"):
        load_fashion_mnist(tmp_path)
    assert not list(local.iterdir())
    server.cuts = download.ATTEMPTS
    with pytest.raises(UserError, match=r"can't be downloaded \(ChunkedEncodingError\)"):
        load_fashion_mnist(tmp_path, hashes)
    assert [path.name for path in local.iterdir()] == [".train-images-idx3-ubyte.gz.part"]
    assert load_fashion_mnist(tmp_path, hashes).test.x.shape == (12, 1, 28, 28)
    assert sorted(path.name for path in local.iterdir()) == sorted(f"{name}.gz" for name in hashes)
