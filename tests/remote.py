"""gs:// as a file system in memory, for tests: etils.epath goes through fsspec's memory implementation."""
import contextlib
from unittest import mock

from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    """fsspec's memory file system under gs://."""

    protocol, store, pseudo_dirs = ("gs",), {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs:/"))


@contextlib.contextmanager
def bucket():
    """An empty gs://."""
    Bucket.store, Bucket.pseudo_dirs = {}, [""]
    pick = lambda self, path: Bucket() if str(path).startswith("gs:") else LocalFileSystem()  # noqa: E731
    with mock.patch.object(backend._FileSystemSpecBackend, "fs", pick):
        yield
