"""Alerts, recording rules and the dashboard against a real Prometheus that scrapes real services under load."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from pathlib import Path

import aiohttp
import pytest

from tests.e2e.conftest import Process, free_ports

HERE = "127.0.0.1"
ROOT = Path(__file__).parents[2]
OBSERVABILITY = ROOT / "docker" / "observability"
UNPACKED = ROOT / ".venv" / "prometheus" / "usr" / "bin"
ENGINE = ["--engine", "emulated", "--engine-prefill-tokens-per-s", "20000", "--engine-decode-step-s", "0.005"]
ENGINE += ["--engine-arena-bytes", "64M", "--node-heartbeat-s", "0.25", "--codec", "zstd"]
NODES = {"d1": ("decode", "home"), "p1": ("prefill", "home"), "p2": ("prefill", "away")}
INTERVAL = "10s"
"""For the dashboard's $__rate_interval: four scrapes at least."""
WAIT_S = 60


pytestmark = pytest.mark.deploy


def program(name: str) -> str | None:
    there = UNPACKED / name
    return shutil.which(name) or (str(there) if there.exists() else None)


needs_prometheus = pytest.mark.skipif(
    program("prometheus") is None or program("promtool") is None,
    reason="no Prometheus here: alerts and dashboard were NOT checked",
)


def promtool(*arguments: str) -> str:
    found = program("promtool")
    assert found is not None
    done = subprocess.run([found, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_prometheus
def test_configuration_and_rules_are_good() -> None:
    assert "SUCCESS" in promtool("check", "config", str(OBSERVABILITY / "prometheus.yml"))


@needs_prometheus
def test_each_alert_fires_for_what_it_is_for_and_else_not() -> None:
    """And each is in that test, with a mend for who reads it."""
    promtool("test", "rules", str(Path(__file__).parent / "alerts.yml"))
    rules, tested = ((OBSERVABILITY / "rules.yml").read_text(), (Path(__file__).parent / "alerts.yml").read_text())
    alerts = re.findall(r"- alert: (\w+)", rules)
    assert len(alerts) >= 10
    assert rules.count("mend: ") == rules.count("summary: ") == len(alerts)
    for alert in alerts:
        assert tested.count(alert) == 2, alert


def dashboard() -> list[tuple[str, str]]:
    """Title and query of everything that is drawn."""
    board = json.loads((OBSERVABILITY / "grafana" / "dashboards" / "prfaas.json").read_text())
    return [(panel["title"], target["expr"]) for panel in board["panels"] for target in panel["targets"]]


class Prometheus:
    """A server of its own that scrapes the cluster each second, with the repository's rules, evaluated as often."""

    def __init__(self, cluster, targets: list[str], folder: Path) -> None:
        self._session = cluster.session
        (port,) = free_ports(1)
        self.url = f"http://{HERE}:{port}"
        # The rules' own windows are minutes: here they are as long as the test can wait.
        rules = (OBSERVABILITY / "rules.yml").read_text().replace("[5m]", f"[{INTERVAL}]")
        (folder / "rules.yml").write_text(rules)
        targets = [{"targets": targets}]
        scrape = [{"job_name": "prfaas-test", "static_configs": targets}]
        times = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config = {"global": times, "rule_files": ["rules.yml"], "scrape_configs": scrape}
        (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        found = program("prometheus")
        arguments = [found, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}"]
        arguments += [f"--web.listen-address={HERE}:{port}", "--log.level=warn"]
        cluster.processes["prometheus"] = Process(
            "prometheus", arguments, self.url, folder / "prometheus.log", own=True
        )

    async def query(self, expr: str) -> list:
        """The samples now; [] while it doesn't answer."""
        params = {"query": expr}
        try:
            async with self._session.get(self.url + "/api/v1/query", params=params) as response:
                body = await response.json()
        except aiohttp.ClientError:
            return []
        assert body["status"] == "success", f"{expr}: {body}"
        return [float(sample["value"][1]) for sample in body["data"]["result"]]


async def load(cluster, until: asyncio.Event) -> None:
    """Conversations of two turns, at home and from the other region, and streams."""
    for turn in range(10_000):
        if until.is_set():
            return
        prompt = [32 + (turn // 2 + i) % 90 for i in range(600 + 300 * (turn % 2))]
        headers = {"x-prfaas-pin-route": ("offload", "home")[turn // 2 % 2]}
        body = {"model": "emulated", "prompt": prompt, "max_tokens": 8, "temperature": 0, "stream": True}
        post = cluster.session.post(cluster.router_url + "/v1/completions", json=body, headers=headers)
        async with post as response:
            assert response.status == 200, await response.text()
            await response.read()


@needs_prometheus
@pytest.mark.timeout(180)
async def test_every_query_of_the_dashboard_and_every_recorded_rule_returns_data(cluster, tmp_path):
    """While real services serve."""
    names = ["router", *NODES]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    cluster.router_url = f"http://{HERE}:{ports['router']}"
    flags = ["--bind", f"{HERE}:{ports['router']}", "--model", "bytes", "--planner-period-s", "1"]
    cluster._add("router", ["prfaas.services", "router", *flags, *cluster._secret], cluster.router_url)
    for name, (role, region) in NODES.items():
        flags = ["--name", name, "--region", region, "--bind", f"{HERE}:{ports[name]}", "--kv-bind", f"{HERE}:0"]
        flags += ["--routers", cluster.router_url]
        cluster._add(name, ["prfaas.services", role, *flags, *cluster._secret, *ENGINE], f"http://{HERE}:{ports[name]}")
    await cluster.wait_for(lambda m: sum(n for k, n in m["prfaas_router_nodes"].items() if "usable" in k) == len(NODES))
    prometheus = Prometheus(cluster, [f"{HERE}:{port}" for port in ports.values()], tmp_path)
    recorded = re.findall(r"- record: (\S+)", (OBSERVABILITY / "rules.yml").read_text())
    missing = {expr: title for title, expr in dashboard()} | dict.fromkeys(recorded, "recorded")
    assert len(missing) > 30
    enough = asyncio.Event()
    loading = asyncio.create_task(load(cluster, enough))
    try:
        async with asyncio.timeout(WAIT_S):
            while missing:
                for expr in list(missing):
                    found = await prometheus.query(expr.replace("$__rate_interval", INTERVAL))
                    if found and all(value == value for value in found):  # NaN: nothing was counted yet
                        del missing[expr]
                await asyncio.sleep(0.5)  # a poll: what Prometheus has can only be asked for
    except TimeoutError:
        pytest.fail(f"no data: {missing}\n{cluster.logs()}")
    finally:
        enough.set()
        await loading
