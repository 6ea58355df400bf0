"""Logs: one JSON object a line, with the request id, without secrets."""

import json
import subprocess
import sys

PROGRAM = """
from prfaas.common import log
log.configure("info", "json")
log.bind_request("req-7")
logger = log.get_logger("router")
logger.debug("not shown")
logger.info("decided", reason="offloaded", cluster_secret="hunter2", ticket="abc", peer="\\udcff")
"""


def test_json_lines_carry_the_request_id_and_hide_secrets():
    """A line names its part and its request; values under secret-looking keys are hidden; debug is filtered."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    event = json.loads(line)
    assert event | {"timestamp": ""} == {
        "event": "decided",
        "level": "info",
        "part": "router",
        "request_id": "req-7",
        "reason": "offloaded",
        "cluster_secret": "<hidden>",
        "ticket": "<hidden>",
        "peer": "\udcff",
        "timestamp": "",
    }


LOST = """
import os
from prfaas.common import log
log.configure("info", "json")
logger = log.get_logger("router")
logger.info("first")
file = os.dup(2)
full = os.open("/dev/full", os.O_WRONLY)
os.dup2(full, 2)
logger.info("lost", number=1)
logger.info("lost", number=2)
assert log.lost_lines() == 2
os.dup2(file, 2)
logger.info("found")
assert log.lost_lines() == 2
"""


def test_lines_that_the_disk_has_no_room_for_are_counted_and_told_of():
    """Whoever logs goes on; as soon as there is room the log says how many are missing, and why."""
    done = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, check=True)
    first, notice, found = map(json.loads, done.stderr.splitlines())
    assert (first["event"], found["event"]) == ("first", "found")
    assert (notice["event"], notice["lines"]) == ("log lines were lost", 2)
    assert notice["reason"] == "No space left on device"


TORN = """
import os, sys
from prfaas.common import log
log.configure("info", "json")
os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
logger = log.get_logger("router")
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (150, resource.RLIM_INFINITY))
for number in range(3):
    logger.info("line", number=number)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
logger.info("room")
"""


def test_a_torn_line_does_not_spoil_the_next(tmp_path):
    """The file takes a part of a line; what comes later begins a line of its own."""
    log = tmp_path / "log"
    subprocess.run([sys.executable, "-c", TORN, str(log)], capture_output=True, check=True)
    first, torn, notice, room = log.read_text().splitlines()
    assert json.loads(first)["number"] == 0
    assert 0 < len(torn) < len(first)
    assert json.loads(notice)["lines"] == 2
    assert json.loads(room)["event"] == "room"


def test_a_process_without_stderr_logs_nowhere():
    """Python gives it none, and the number 2 may be a socket's."""
    command = (
        f'{sys.executable} -c \'from prfaas.common import log; log.configure(); log.get_logger("x").info("y")\' 2>&-'
    )
    assert subprocess.run(["/bin/sh", "-c", command], check=False).returncode == 0
