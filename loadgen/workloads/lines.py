"""Lines of a file, plain or gzip, within bounds: no line, count or unpacked size can fill the memory."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from prfaas.common.errors import ConfigError

MAX_LINE_BYTES = 4 << 20
"""A prompt of 16 M tokens in blocks of 512 has 32,768 ids of at most 20 characters."""
MAX_LINES = 20_000_000
MAX_UNPACKED_BYTES = 16 << 30
GZIP_MAGIC = b"\x1f\x8b"


def read_lines(
    path: str, *, max_line_bytes: int = MAX_LINE_BYTES, max_lines: int = MAX_LINES
) -> Iterator[tuple[int, str]]:
    """(number from 1, text without its end) of each line that isn't blank. gzip is known by its first bytes, not by the
    file's name, and unpacked as it is read. Raises ConfigError naming the file and, where one is at fault, the line."""
    number = 0
    try:
        with Path(path).open("rb") as raw:
            packed = raw.read(2) == GZIP_MAGIC
            raw.seek(0)
            with gzip.GzipFile(fileobj=raw) if packed else raw as stream:
                for number, line in _bounded(stream, path, max_line_bytes, max_lines):
                    # A byte order mark can stand before the first line only.
                    if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                        yield number, text
    except UnicodeDecodeError:
        raise ConfigError([f"{path} line {number}: not UTF-8"]) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError([f"{path}: the gzip stream breaks off after line {number} ({error})"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror or error}"]) from None


def _bounded(
    stream: BinaryIO | gzip.GzipFile, path: str, max_line_bytes: int, max_lines: int
) -> Iterator[tuple[int, bytes]]:
    number = total = 0
    while line := stream.readline(max_line_bytes + 1):
        number += 1
        total += len(line)
        if len(line) > max_line_bytes:
            raise ConfigError([f"{path} line {number}: longer than {max_line_bytes:,} bytes"])
        if number > max_lines:
            raise ConfigError([f"{path}: more than {max_lines:,} lines; cut it"])
        if total > MAX_UNPACKED_BYTES:
            raise ConfigError([f"{path}: more than {MAX_UNPACKED_BYTES >> 30} GiB unpacked; cut it"])
        yield number, line
