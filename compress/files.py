"""Files and folders that are written whole or not at all, and locks that one process has at a time."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from compress.errors import NoSpace, is_disk_full
from compress.phases import phase
from compress.process import Progress


def write_whole(file: Path, text: str) -> None:
    """Write a text into a file, all of it or nothing; a device or a pipe is written to directly.

    Raises NoSpace when the disk fills, OSError where it can't be written to.
    """
    plain = file.is_file() or not file.exists()
    fresh = file.with_name(f".{file.name}.{os.getpid()}.partial") if plain else file
    try:
        fresh.write_text(text, encoding="utf-8")
        if plain:
            fresh.replace(file)
    except OSError as error:
        if plain:
            fresh.unlink(missing_ok=True)
        if is_disk_full(error):
            raise NoSpace(f"the disk filled while {file} was written; free some space and run again") from None
        raise


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name `target` when the block ends well and vanishes when it doesn't.

    Raises NoSpace when the disk fills.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    partial.chmod(0o755)
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            shutil.rmtree(partial)  # another run made the same meanwhile: same digest, same content
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_disk_full(error):
            raise NoSpace(f"the disk filled while {target} was written; nothing of it is left, free some space and run again") from None
        raise


def take_lock(file: IO[Any], another: str, progress: Progress) -> None:
    """Lock an open file for this process; progress says when `another` is waited for. The kernel frees a killed process's lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        progress(f"waiting for another {another}", 0, 1)
        with phase("waiting for others"):
            fcntl.flock(file, fcntl.LOCK_EX)
        progress(f"waiting for another {another}", 1, 1)
