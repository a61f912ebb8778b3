import hashlib
import http.server
import io
import os
import resource
import stat
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.training.conftest import write_kather_stand_in_archive
from training import fetch as module
from training.fetch import BadArchive, DownloadFailed, NoRoom, WrongChecksum, fetch, require_room
from training.synthetic import KATHER_FOLDER, KINDS, kather_folder

NO_WAITS = (0.0, 0.0)  # two more attempts, at once


@dataclass
class Shelf:
    """A file server's file, and what is wrong with the server."""

    content: bytes
    url: str = ""
    ranges: list[str | None] = field(default_factory=list)  # what was asked for, request by request
    cut_after: list[int] = field(default_factory=list)  # bytes sent in the next answers before the line breaks
    statuses: list[int] = field(default_factory=list)  # of the next answers, in place of a file
    ignores_range: bool = False
    skips: int = 0  # bytes left out at the start of a resumed answer

    @property
    def md5(self) -> str:
        return hashlib.md5(self.content).hexdigest()


def handler_for(shelf: Shelf) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            shelf.ranges.append(self.headers.get("Range"))
            if shelf.statuses:
                self.send_error(shelf.statuses.pop(0))
                return
            start, status = 0, 200
            if shelf.ranges[-1] and not shelf.ignores_range:
                start, status = int(shelf.ranges[-1].removeprefix("bytes=").rstrip("-")) + shelf.skips, 206
            total = len(shelf.content)
            if status == 206 and start >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(status)
            self.send_header("Content-Length", str(total - start))
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            self.end_headers()
            length = shelf.cut_after.pop(0) if shelf.cut_after else total
            self.wfile.write(shelf.content[start : start + length])

        def log_message(self, *args):
            pass

    return Handler


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("published") / "archive.zip"
    write_kather_stand_in_archive(path, per_class=1)
    return path.read_bytes()


@pytest.fixture
def shelf(archive: bytes) -> Iterator[Shelf]:
    shelf = Shelf(archive)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler_for(shelf)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        shelf.url = f"http://127.0.0.1:{server.server_port}/files/{KATHER_FOLDER}.zip?download=1"
        yield shelf
        server.shutdown()
        thread.join()


def fetch_from(shelf: Shelf, target: Path) -> Path:
    return fetch(shelf.url, target, shelf.md5, NO_WAITS)


def is_whole(tree: Path) -> bool:
    folders = sorted(path.name for path in tree.iterdir())
    return folders == [kather_folder(kind) for kind in KINDS] and len(list(tree.rglob("*.tif"))) == len(KINDS)


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as content:
        for name in names:
            content.writestr(zipfile.ZipInfo(name), b"bytes")
    return file.getvalue()


def test_the_tree_arrives_whole_and_is_not_fetched_twice(shelf: Shelf, tmp_path: Path):
    tree = fetch_from(shelf, tmp_path / "new" / "data")
    assert tree == tmp_path / "new" / "data" / KATHER_FOLDER
    assert is_whole(tree)
    assert [path.name for path in tree.parent.iterdir()] == [KATHER_FOLDER]  # no archive, no leftovers

    assert fetch_from(shelf, tmp_path / "new" / "data") == tree
    assert len(shelf.ranges) == 1


def test_a_cut_connection_goes_on_where_it_broke(shelf: Shelf, tmp_path: Path):
    half = len(shelf.content) // 2
    shelf.cut_after = [half]
    assert is_whole(fetch_from(shelf, tmp_path))
    assert shelf.ranges == [None, f"bytes={half}-"]


def test_a_line_that_keeps_breaking_fails_and_the_next_call_resumes(shelf: Shelf, tmp_path: Path):
    shelf.cut_after = [1000, 500, 250]
    with pytest.raises(DownloadFailed, match=r"1,750 bytes are kept, the same command goes on from there"):
        fetch_from(shelf, tmp_path)
    assert is_whole(fetch_from(shelf, tmp_path))
    assert shelf.ranges == [None, "bytes=1000-", "bytes=1500-", "bytes=1750-"]


def test_a_server_without_ranges_is_read_from_the_start(shelf: Shelf, tmp_path: Path):
    shelf.ignores_range = True
    shelf.cut_after = [1000]
    assert is_whole(fetch_from(shelf, tmp_path))


def test_an_answer_from_another_place_is_not_appended(shelf: Shelf, tmp_path: Path):
    shelf.skips = 10
    shelf.cut_after = [1000]
    assert is_whole(fetch_from(shelf, tmp_path))
    assert shelf.ranges == [None, "bytes=1000-", None]


def test_all_bytes_had_come_before(shelf: Shelf, tmp_path: Path):
    (tmp_path / f"{KATHER_FOLDER}.zip.part").write_bytes(shelf.content)
    assert is_whole(fetch_from(shelf, tmp_path))
    assert shelf.ranges == [f"bytes={len(shelf.content)}-"]


def test_more_bytes_than_there_are_start_again(shelf: Shelf, tmp_path: Path):
    (tmp_path / f"{KATHER_FOLDER}.zip.part").write_bytes(shelf.content + b"of another file")
    assert is_whole(fetch_from(shelf, tmp_path))


def test_an_archive_put_there_by_hand_is_used(shelf: Shelf, tmp_path: Path):
    (tmp_path / f"{KATHER_FOLDER}.zip").write_bytes(shelf.content)
    assert is_whole(fetch_from(shelf, tmp_path))
    assert shelf.ranges == []


def test_a_busy_server_is_asked_again(shelf: Shelf, tmp_path: Path):
    shelf.statuses = [503, 429]
    assert is_whole(fetch_from(shelf, tmp_path))


def test_a_missing_file_is_not(shelf: Shelf, tmp_path: Path):
    shelf.statuses = [404]
    with pytest.raises(DownloadFailed, match="answered 404 Not Found"):
        fetch_from(shelf, tmp_path)
    assert len(shelf.ranges) == 1


def test_nobody_there(tmp_path: Path):
    with http.server.HTTPServer(("127.0.0.1", 0), handler_for(Shelf(b""))) as server:
        port = server.server_port
    with pytest.raises(DownloadFailed, match="0 bytes are kept"):
        fetch(f"http://127.0.0.1:{port}/a.zip", tmp_path, "", NO_WAITS)


def test_wrong_bytes_are_removed(shelf: Shelf, tmp_path: Path):
    expected = shelf.md5
    shelf.content = shelf.content[:-1] + b"!"
    with pytest.raises(WrongChecksum, match=f"has MD5 {shelf.md5}, expected {expected}.*removed"):
        fetch(shelf.url, tmp_path, expected, NO_WAITS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["top/../../evil", "../evil", "/evil", "top\\..\\..\\evil", "C:/evil", "\\\\host\\evil"]
)
def test_a_path_out_of_the_folder_is_refused(shelf: Shelf, tmp_path: Path, name: str):
    shelf.content = zipped("top/good", name)
    with pytest.raises(BadArchive, match="leads outside its folder: nothing unpacked"):
        fetch_from(shelf, tmp_path / "data")
    assert not list(tmp_path.rglob("*evil*")) and not list(tmp_path.rglob("good"))


def test_a_link_is_refused(shelf: Shelf, tmp_path: Path):
    link = zipfile.ZipInfo("top/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as content:
        content.writestr(link, "/etc")
    shelf.content = file.getvalue()
    with pytest.raises(BadArchive, match="'top/link', which leads outside"):
        fetch_from(shelf, tmp_path)


@pytest.mark.parametrize("names", [(), ("one/a", "two/b"), ("file",)])
def test_an_archive_of_another_layout_is_refused(shelf: Shelf, tmp_path: Path, names: tuple[str, ...]):
    shelf.content = zipped(*names)
    with pytest.raises(BadArchive, match="does not hold one folder"):
        fetch_from(shelf, tmp_path)


def test_what_is_no_archive_is_refused(shelf: Shelf, tmp_path: Path):
    shelf.content = b"<html>not found</html>"
    with pytest.raises(BadArchive, match="cannot be unpacked: File is not a zip file"):
        fetch_from(shelf, tmp_path)


def test_an_archive_that_would_fill_the_disk_is_refused(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_UNPACKED_BYTES", 1000)
    with pytest.raises(BadArchive, match=r"would unpack to 17 files of .* at most .* of 1,000 bytes"):
        fetch_from(shelf, tmp_path)


def test_what_a_killed_unpacking_left_is_no_tree(shelf: Shelf, tmp_path: Path):
    half = tmp_path / f"{KATHER_FOLDER}.unpacking" / KATHER_FOLDER / "99_HALF"
    half.mkdir(parents=True)
    assert is_whole(fetch_from(shelf, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [KATHER_FOLDER]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_while_downloading(shelf: Shelf, tmp_path: Path):
    (tmp_path / f"{KATHER_FOLDER}.zip.part").symlink_to("/dev/full")
    with pytest.raises(NoRoom, match="the disk is full"):
        fetch_from(shelf, tmp_path)


def test_a_full_disk_while_unpacking_leaves_the_archive_and_no_half_tree(shelf: Shelf, tmp_path: Path):
    archive = tmp_path / f"{KATHER_FOLDER}.zip"
    archive.write_bytes(shelf.content)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # a tile has 67,500 bytes
    try:
        with pytest.raises(NoRoom, match="the disk is full"):
            fetch_from(shelf, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [archive]
    assert is_whole(fetch_from(shelf, tmp_path))


def test_room_is_asked_for_beforehand(tmp_path: Path):
    require_room(tmp_path, 1)
    with pytest.raises(NoRoom, match=r"1,152,921,504,606,846,976 are needed: free some room"):
        require_room(tmp_path, 1 << 60)
