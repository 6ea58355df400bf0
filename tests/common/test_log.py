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
