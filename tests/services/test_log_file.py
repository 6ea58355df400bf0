"""The log's way out: what can't be written is dropped and counted, and said once it can be."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prfaas.services.log_file import NOT_READ, LogFile


def say_dropped(lines: int, reason: str) -> str:
    return f"{lines} lost: {reason}\n"


class Pipe:
    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self.log = LogFile(self.writer, say_dropped)

    def fill(self) -> None:
        os.set_blocking(self.writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(self.writer, b"\n" * 4096)
        os.set_blocking(self.writer, True)  # or a write that should not be tried would not block

    def read(self) -> list[str]:
        data = b""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self.reader, 1 << 20):
                data += piece
        return [line for line in data.decode().splitlines() if line]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    for descriptor in (made.reader, made.writer):
        with contextlib.suppress(OSError):  # the test closed it
            os.close(descriptor)


def test_lines_that_nobody_reads_are_dropped_and_told_of(pipe: Pipe) -> None:
    """Into a full pipe nothing is written and nothing blocks; once it is read, the next line comes after one that says
    how many are missing and why, and that is said once."""
    pipe.log.write("first\n")
    pipe.fill()
    for _ in range(3):
        pipe.log.write("lost\n")
    assert pipe.log.lines_dropped == 3
    assert pipe.read() == ["first"]
    pipe.log.write("again\n")
    pipe.log.write("and again\n")
    assert pipe.read() == [f"3 lost: {NOT_READ}", "again", "and again"]
    assert pipe.log.lines_dropped == 3


def test_a_line_longer_than_the_pipe_has_room_is_dropped_and_ended(pipe: Pipe) -> None:
    """What was written of it is no part of the next line."""
    pipe.log.write("x" * (1 << 20) + "\n")
    assert pipe.log.lines_dropped == 1
    assert set(pipe.read()[0]) == {"x"}
    pipe.log.write("next\n")
    assert pipe.read() == [f"1 lost: {NOT_READ}", "next"]


def test_a_reader_that_is_gone_raises_nothing(pipe: Pipe) -> None:
    os.close(pipe.reader)
    pipe.log.write("lost\n")
    assert pipe.log.lines_dropped == 1


def test_a_closed_descriptor_raises_nothing(pipe: Pipe) -> None:
    os.close(pipe.writer)
    pipe.log.write("lost\n")
    assert pipe.log.lines_dropped == 1


def test_lines_of_threads_stay_whole_and_are_all_accounted_for(pipe: Pipe) -> None:
    """Of what threads write into a pipe that is too small each line arrives whole or is counted as dropped."""
    lines = [[f"{thread} {i} " + "." * 300 for i in range(300)] for thread in range(4)]

    def write(mine: list[str]) -> None:
        for line in mine:
            pipe.log.write(line + "\n")

    threads = [threading.Thread(target=write, args=(mine,)) for mine in lines]
    for thread in threads:
        thread.start()
    seen: list[str] = []
    while any(thread.is_alive() for thread in threads):
        seen += pipe.read()
    seen += pipe.read()
    written = [line for line in seen if "lost" not in line]
    assert set(written) <= {line for mine in lines for line in mine}
    assert len(written) + pipe.log.lines_dropped == 4 * 300


def test_what_has_no_utf_8_is_written_escaped(pipe: Pipe) -> None:
    pipe.log.write("peer \udcff\n")
    assert pipe.read() == ["peer \\udcff"]


# A file that may grow to 1,000 bytes is a full disk for those who aren't root: the last line fits by half.
FULL = """
import logging, os, resource, sys
from functools import partial
from prfaas.common import log
from prfaas.common.metrics import Metrics
from prfaas.services.log_file import LogFile

descriptor = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
log.configure("info", "json", partial(LogFile, descriptor))
logger, plain = log.get_logger("node"), logging.getLogger("aiohttp")
for number in range(20):
    logger.info("line", number=number, cluster_secret="hunter2")
    plain.warning("plain")
dropped = log.lines_dropped()
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
logger.info("again")
print(dropped)
print([line for line in Metrics().render().decode().splitlines() if line.startswith("prfaas_log")])
"""


def test_a_full_disk_is_survived_and_told_of(tmp_path: Path) -> None:
    """structlog's lines and the standard library's: those that fit are there, the others counted in the metric; then
    one line tells of them, in the log's own format, and does not continue what the full disk left of a line."""
    file = tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", FULL, str(file)], capture_output=True, text=True, check=True)
    count, metric = done.stdout.splitlines()
    dropped = int(count)
    assert 0 < dropped < 40
    assert metric == f"['prfaas_log_lines_dropped_total {float(dropped)}']"
    *before, torn, told, again = file.read_text().splitlines()
    assert len(before) == 40 - dropped
    assert "hunter2" not in "".join(before) + torn
    with pytest.raises(ValueError, match=r"delimiter|Unterminated|Expecting"):
        json.loads(torn)
    told_of = json.loads(told)
    assert told_of.pop("timestamp")
    assert told_of == {
        "event": "log lines were lost",
        "level": "error",
        "part": "log",
        "lines": dropped,
        "reason": "File too large",
    }
    assert json.loads(again)["event"] == "again"
