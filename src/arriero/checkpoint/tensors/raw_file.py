"""A file that is read at offsets."""

from __future__ import annotations

import functools
import mmap
import os
from pathlib import Path

from arriero.common.errors import UserError
from arriero.common.files import open_regular


class RawFile:
    """An open file that is read at offsets; safe to share between threads.

    Args:
        path: the file; a symbolic link is followed.
        mapped: copy columns of a matrix from the file's mapped pages, which is faster than a read a row; the pages
            count as this process's memory while it is short of none.
    """

    def __init__(self, path: Path, *, mapped: bool = False) -> None:
        self.path, self.mapped = path, mapped
        try:
            self._fd = open_regular(path, follow=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})", "check the path") from None
        self.size = os.fstat(self._fd).st_size

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fills `out` from byte `offset` on."""
        done = 0
        while done < len(out):
            try:
                got = os.preadv(self._fd, [out[done:]], offset + done)
            except OSError as error:
                raise UserError(f"{self.path}: cannot be read ({error.strerror})", "fetch the file again") from None
            if got <= 0:
                raise UserError(f"{self.path}: ends at byte {offset + done}, in mid-tensor", "fetch the file again")
            done += got

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on."""
        buffer = bytearray(size)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    @functools.cached_property
    def pages(self) -> mmap.mmap:
        """The file's pages: only what is touched is read."""
        return mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)
