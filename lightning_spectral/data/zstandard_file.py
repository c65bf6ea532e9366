"""Reading ``.zst`` files so that one which was cut is an error: the package's own reader ends there without a word."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

from typing_extensions import override

_READ_BYTES = 1 << 12  # one such piece of a hostile file becomes 128 MiB at most


def open_zstandard(file: Path) -> io.TextIOWrapper:
    """The text of a file of one or more frames.

    Raises:
        ValueError: If the package ``zstandard`` is not installed.
    """
    if importlib.util.find_spec("zstandard") is None:
        raise ValueError(f"`{file}` needs the package `zstandard`: `pip install zstandard`.")
    return io.TextIOWrapper(io.BufferedReader(_Frames(file), 1 << 17), encoding="utf-8-sig")


class _Frames(io.RawIOBase):
    """The bytes of all frames, one after the other.

    Raises:
        EOFError: While reading: it ends inside a frame.
        OSError: While reading: it is damaged.
    """

    def __init__(self, file: Path) -> None:
        import zstandard

        self._decompressor, self._error = zstandard.ZstdDecompressor(), zstandard.ZstdError
        self._file = file.open("rb")
        self._frame: Any = None
        self._unread, self._out = b"", memoryview(b"")

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Any) -> int:
        while not self._out:
            piece = self._unread or self._file.read(_READ_BYTES)
            if not piece:
                if self._frame is not None:
                    raise EOFError("it ends inside a compressed frame")
                return 0
            self._out = memoryview(self._decompressed(piece))
        count = min(len(buffer), len(self._out))
        buffer[:count], self._out = self._out[:count], self._out[count:]
        return count

    @override
    def close(self) -> None:
        self._file.close()
        super().close()

    def _decompressed(self, piece: bytes) -> bytes:
        self._frame = self._frame or self._decompressor.decompressobj()
        try:
            made: bytes = self._frame.decompress(piece)
        except self._error as error:
            raise OSError(str(error)) from error
        self._unread = self._frame.unused_data if self._frame.eof else b""
        self._frame = None if self._frame.eof else self._frame
        return made
