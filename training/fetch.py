"""Brings a public data set to disk: download that resumes, MD5, safe unpacking, a whole tree or none.

What enters is an address and a checksum; what leaves is the folder that `training.data` scans.
"""

import errno
import hashlib
import shutil
import stat
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

import httpx
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

# Kather et al. 2016, CC BY 4.0, doi 10.5281/zenodo.53169: 5,000 tiles, 246 MB.
KATHER_URL = "https://zenodo.org/records/53169/files/Kather_texture_2016_image_tiles_5000.zip"
KATHER_MD5 = "0ddbebfc56344752028fda72602aaade"

WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # before the second and later attempts
TIMEOUT_S = 30.0
MAX_FILES = 200_000  # forty times the Kather set: what holds more, or unpacks to more, is no set of tiles
MAX_UNPACKED_BYTES = 16 << 30


class DownloadFailed(OSError):
    pass


class BrokenOff(ConnectionError):
    """Worth another attempt, like all that httpx calls a transport error."""


class NoRoom(OSError):
    pass


class WrongChecksum(ValueError):
    pass


class BadArchive(ValueError):
    pass


def fetch(url: str, target_dir: Path, md5: str, waits_s: Sequence[float] = WAITS_S) -> Path:
    """The unpacked tree, named like the archive. A tree that is there already is complete, so nothing is downloaded.

    An archive put there by hand is verified and used.
    """
    archive = target_dir / PurePosixPath(httpx.URL(url).path).name
    tree = target_dir / archive.stem
    if tree.is_dir():
        return tree
    target_dir.mkdir(parents=True, exist_ok=True)
    if not archive.exists():
        download(url, archive, waits_s)
    verify(archive, md5)
    unpack(archive, tree)
    archive.unlink()
    return tree


# -- download ------------------------------------------------------------------------------------------------------


def download(url: str, archive: Path, waits_s: Sequence[float] = WAITS_S) -> None:
    part = archive.with_name(archive.name + ".part")
    with httpx.Client(follow_redirects=True, timeout=TIMEOUT_S) as client, progress_bar() as progress:
        bar = progress.add_task(archive.name, total=None)

        def show(done_bytes: int, total_bytes: int | None) -> None:
            progress.update(bar, completed=done_bytes, total=total_bytes)

        for wait_s in (*waits_s, None):
            try:
                continue_download(client, url, part, show)
                break
            except (httpx.TransportError, BrokenOff) as error:
                if wait_s is None:
                    raise DownloadFailed(broken_off(url, part, error)) from error
                progress.console.print(f"{url} broke off ({error}); trying again in {wait_s:g} s", highlight=False)
                time.sleep(wait_s)
    part.replace(archive)


def continue_download(client: httpx.Client, url: str, part: Path, show: Callable[[int, int | None], None]) -> None:
    """Asks for what is missing; a server that sends everything all the same is read from the start."""
    have = part.stat().st_size if part.exists() else 0
    # identity: bytes must arrive as they lie on the server, or their number means nothing
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with client.stream("GET", url, headers=headers) as response:
        where = response.headers.get("Content-Range", "")
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE and where == f"bytes */{have}":
            return  # everything had come before
        refuse_status(response, have, part)
        start = have if response.status_code == httpx.codes.PARTIAL_CONTENT else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        require_room(part.parent, int(length or 0))
        append(response, part, start, lambda done: show(done, total))


def refuse_status(response: httpx.Response, have: int, part: Path) -> None:
    where = response.headers.get("Content-Range", "")
    elsewhere = response.status_code == httpx.codes.PARTIAL_CONTENT and not where.startswith(f"bytes {have}-")
    if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE or elsewhere:
        part.unlink(missing_ok=True)
        raise BrokenOff(f"the server cannot go on from byte {have:,}, so it starts again")
    answer = f"{response.status_code} {response.reason_phrase}"
    if response.status_code == httpx.codes.TOO_MANY_REQUESTS or response.is_server_error:
        raise BrokenOff(f"the server is busy: {answer}")
    if not response.is_success:
        raise DownloadFailed(f"{response.url} answered {answer}")


def append(response: httpx.Response, part: Path, start: int, show: Callable[[int], None]) -> None:
    done = start
    show(done)
    try:
        with part.open("ab" if start else "wb") as file:
            for chunk in response.iter_raw():  # as they come: larger chunks would be lost when the line breaks
                file.write(chunk)
                done += len(chunk)
                show(done)
    except OSError as error:
        raise in_plain_words(part, error) from error


def broken_off(url: str, part: Path, error: Exception) -> str:
    have = part.stat().st_size if part.exists() else 0
    return (
        f"{url} could not be read to its end ({str(error) or type(error).__name__}); {have:,} bytes are kept, the same "
        f"command goes on from there. An archive put into {part.parent} by hand is used, too"
    )


def progress_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))


def verify(archive: Path, md5: str) -> None:
    with archive.open("rb") as file:
        actual = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if actual != md5:
        archive.unlink()
        raise WrongChecksum(
            f"{archive.name} has MD5 {actual}, expected {md5}: damaged on the way, or not the published file. "
            "It has been removed; the same command downloads it again"
        )


# -- unpack --------------------------------------------------------------------------------------------------------


def unpack(archive: Path, tree: Path) -> None:
    """Into a folder beside `tree` that gets its name at the very end: a killed unpacking leaves no half tree."""
    unfinished = tree.with_name(tree.name + ".unpacking")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as content:
            top = check_members(content, archive.name)
            require_room(tree.parent, sum(member.file_size for member in content.infolist()))
            content.extractall(unfinished)
        (unfinished / top).rename(tree)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # damaged; odd compression; a password
        raise BadArchive(f"{archive.name} cannot be unpacked: {error}") from error
    except OSError as error:
        raise in_plain_words(tree, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_members(content: zipfile.ZipFile, name: str) -> str:
    """The one folder that holds everything; refuses what could land, or point, outside the target."""
    members = content.infolist()
    for member in members:
        path = PureWindowsPath(member.filename)  # knows both slashes and drive letters, so it is the stricter reader
        if path.anchor or ".." in path.parts or stat.S_ISLNK(member.external_attr >> 16):
            raise BadArchive(f"{name} holds '{member.filename}', which leads outside its folder: nothing unpacked")
    unpacked_bytes = sum(member.file_size for member in members)
    if len(members) > MAX_FILES or unpacked_bytes > MAX_UNPACKED_BYTES:
        raise BadArchive(
            f"{name} would unpack to {len(members):,} files of {unpacked_bytes:,} bytes; "
            f"at most {MAX_FILES:,} files of {MAX_UNPACKED_BYTES:,} bytes are accepted"
        )
    tops = {member.filename.partition("/")[0] for member in members}
    if len(tops) != 1 or not all("/" in member.filename for member in members):
        raise BadArchive(f"{name} does not hold one folder with everything in it, but {sorted(tops)[:3]}")
    return tops.pop()


# -- room ----------------------------------------------------------------------------------------------------------


def require_room(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise NoRoom(f"{folder} has {free_bytes:,} bytes free and {needed_bytes:,} are needed: free some room")


def in_plain_words(path: Path, error: OSError) -> OSError:
    """The same error, unless the disk, a quota or a limit on file sizes was the reason."""
    if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return error
    return NoRoom(f"{path} could not be written, the disk is full ({error.strerror}): free some room and run it again")
