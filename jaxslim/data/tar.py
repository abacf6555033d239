"""WebDataset tar files: an index of what is where, clips read one at a time from any position.

A sample is the files that share a name up to the first dot: `a1.flac` with `a1.txt` (the text) or `a1.json` (a text
and other columns). Uncompressed archives only: a clip is then a byte range, so any host can read just its own rows,
in any order, and a position stays two numbers. Names with braces stand for several files: `part-{000..015}.tar`.
"""
from __future__ import annotations

import dataclasses
import json
import posixpath
import re
import tarfile
from collections.abc import Iterator

from jaxslim.data.rows import DataError

AUDIO = ("wav", "flac", "mp3", "ogg", "opus", "m4a", "webm")


@dataclasses.dataclass(frozen=True)
class Range:
    """Bytes of a file, read when they are asked for; behaves like an Arrow binary scalar."""

    path: str
    offset: int
    size: int
    is_valid = True

    def as_buffer(self) -> Range:
        return self

    def to_pybytes(self) -> bytes:
        with _open(self.path) as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise DataError(f"{self.path} ends before byte {self.offset + self.size}; copy it again.")
        return data


def expand(source: str) -> list[str]:
    """'a-{00..03}.tar' -> its files, in order."""
    if not (found := re.search(r"\{(\d+)\.\.(\d+)\}", source)):
        return [source]
    first, last = found.groups()
    numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return [path for n in numbers for path in expand(source[: found.start()] + n + source[found.end() :])]


def read(source: str) -> list[dict]:
    """The rows of one or several tar files: id, audio (a Range), text and what the .json files hold.

    Raises:
      DataError: no readable tar file, a compressed one, or one without audio.
    """
    return [record for path in expand(source) for record in records(path)]


def records(path: str) -> Iterator[dict]:
    samples: dict[str, dict] = {}
    try:
        with _open(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                folder, name = posixpath.split(member.name)
                key, _, kind = name.partition(".")
                if not member.isfile() or not kind:
                    continue
                kind, record = kind.lower(), samples.setdefault(posixpath.join(folder, key), {})
                if kind in AUDIO:
                    where = Range(path, member.offset_data, member.size)
                    record["audio"] = {"bytes": where, "path": member.name}
                elif kind == "txt":
                    record["text"] = archive.extractfile(member).read().decode().strip()
                elif kind == "json":
                    record |= {k: v for k, v in json.loads(archive.extractfile(member).read()).items() if k != "audio"}
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{path} is not an uncompressed tar file of text and audio ({str(error).rstrip('.')}); unpack "
                        "a .tar.gz and pack it anew without compression.") from error
    rows = [{"id": key, **record} for key, record in samples.items() if "audio" in record]
    if not rows:
        raise DataError(f"{path} holds no audio ({', '.join(AUDIO)}).")
    return iter(rows)


def _open(path: str):
    if "://" not in path:
        return open(path, "rb")
    from etils import epath

    return epath.Path(path).open("rb")
