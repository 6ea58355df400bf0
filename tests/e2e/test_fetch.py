"""A longer prefix in the other region is fetched when the link makes that worth it, real processes and a real line."""

from __future__ import annotations

import asyncio
import random
import signal

import aiohttp
import pytest

from tests.e2e.conftest import free_ports

pytestmark = pytest.mark.deploy

HERE = "127.0.0.1"
# 4 KB a token, so that 3,000 tokens are 12 MB: 0.05 s at 2 Gbit/s and 5 s at 20 Mbit/s, beside 1 s of prefill.
ENGINE = ["--engine", "emulated", "--engine-prefill-tokens-per-s", "3000", "--engine-arena-bytes", "128M"]
ENGINE += ["--engine-decode-step-s", "0.005", "--node-heartbeat-s", "0.25", "--codec", "raw"]
PROMPT, MORE = 3000, 200
FAST, SLOW = "2000", "20"
ASSUMED = 1.25e9
"""Bytes/s of a link before it is measured, by default."""


class Regions:
    """Home has a decode node without a pool and a prefill node, the dense region a prefill node."""

    def __init__(self, cluster, folder):
        self.cluster = cluster
        self.rate_file = folder / "rate-mbit"
        names = ("router", "d1", "p-home", "p-dense", "kv-d1", "kv-home", "kv-dense")
        wan = ("wan-router", "wan-kv-d1", "wan-kv-home", "wan-dense", "wan-kv-dense")
        self.ports = dict(zip((*names, *wan), free_ports(len(names) + len(wan)), strict=True))

    async def line(self, rate_mbit):
        """The process that is the WAN, at this rate."""
        ports = self.ports
        ways = [("--forward", "wan-router", "router"), ("--forward", "wan-kv-d1", "kv-d1")]
        ways += [("--forward", "wan-kv-home", "kv-home")]
        ways += [("--backward", "wan-dense", "p-dense"), ("--backward", "wan-kv-dense", "kv-dense")]
        self.rate_file.write_text(rate_mbit)
        arguments = ["prfaas.services.wan.proxy", "--rate-file", str(self.rate_file), "--delay-ms", "2"]
        for flag, listen, target in ways:
            arguments += [flag, f"{HERE}:{ports[listen]}={HERE}:{ports[target]}"]
        wan = self.cluster._add("wan", arguments, "")
        while "READY" not in wan.tail():
            assert wan.alive, wan.tail()
            await asyncio.sleep(0.02)  # a poll, since it says so in its log alone

    def change(self, rate_mbit):
        """The line's rate, while it is used."""
        self.rate_file.write_text(rate_mbit)
        self.cluster.processes["wan"].signal(signal.SIGHUP)

    async def start(self, rate_mbit):
        cluster, ports = self.cluster, self.ports
        cluster.router_url = f"http://{HERE}:{ports['router']}"
        await self.line(rate_mbit)
        bind = ["--bind", f"{HERE}:{ports['router']}", "--model", "bytes"]
        cluster._add("router", ["prfaas.services", "router", *bind, *cluster._secret], cluster.router_url)
        self.node("d1", "decode", "home", "router", "kv-d1", ["--engine-prefix-bytes", "0"])
        self.node("p-home", "prefill", "home", "router", "kv-home", [])
        self.node("p-dense", "prefill", "dense", "wan-router", "kv-dense", ["--advertise", self.url("wan-dense")])
        await self.all_there()

    def node(self, name, role, region, router, kv, more):
        ports = self.ports
        flags = ["--name", name, "--region", region, "--routers", self.url(router), "--bind", f"{HERE}:{ports[name]}"]
        flags += ["--kv-bind", f"{HERE}:{ports[kv]}", "--kv-advertise", f"{HERE}:{ports[f'wan-{kv}']}"]
        cluster = self.cluster
        cluster._add(name, ["prfaas.services", role, *flags, *cluster._secret, *ENGINE, *more], self.url(name))

    def url(self, name):
        return f"http://{HERE}:{self.ports[name]}"

    async def all_there(self):
        nodes = {'role="prefill",state="usable"': 2, 'role="decode",state="usable"': 1}
        await self.cluster.wait_for(
            lambda m: all(m.get("prfaas_router_nodes", {}).get(which, 0) == count for which, count in nodes.items())
        )

    async def ask(self, prompt, route):
        """The answer's headers; the prompt is prefilled by the route."""
        body = {"model": "emulated", "prompt": prompt, "max_tokens": 4, "temperature": 0}
        headers = {"x-prfaas-pin-route": route}
        timeout = aiohttp.ClientTimeout(total=60)
        post = self.cluster.session.post(
            self.cluster.router_url + "/v1/completions", json=body, headers=headers, timeout=timeout
        )
        async with post as response:
            assert response.status == 200, f"{await response.text()}\n{self.cluster.logs()}"
            return dict(response.headers), (await response.json())["choices"][0]["text"]

    async def held_in_dense(self, prompt):
        """Prefill it there, and wait until the router has heard of its blocks."""
        before = blocks(await self.cluster.metrics())
        await self.ask(prompt, "offload")
        await self.cluster.wait_for(lambda m: blocks(m) >= before + PROMPT // 64)

    async def use_line(self, seeds, until):
        """Prefill prompts over there, until the way home is reckoned to carry what is asked for."""
        found = []
        for seed in seeds:
            await self.ask(prompt(seed), "offload")
            found.append(measured(await self.cluster.metrics()))
            if until(found[-1]):
                return
        pytest.fail(f"the way home is reckoned to carry {found} bytes/s, transfer by transfer")

    async def fetches(self):
        return (await self.cluster.metrics()).get("prfaas_router_fetches_total", {})


def blocks(metrics):
    return metrics["prfaas_router_prefix_blocks"][""]


def prompt(seed):
    return [random.Random(seed).randrange(32, 127) for _ in range(PROMPT)]


async def test_a_prefix_is_fetched_while_the_line_is_wide_and_computed_while_it_is_narrow(cluster, tmp_path):
    """The line, which transfers measure, becomes a narrow one under them, and wide again: at home a second turn begins
    with what the dense region holds, or computes it. Its answer is always that of a prompt which is computed whole."""
    regions = Regions(cluster, tmp_path)
    await regions.start(FAST)
    prompts = [prompt(seed) for seed in range(3)]
    for first in prompts:
        await regions.held_in_dense(first)
    await cluster.wait_for(lambda m: measured(m) > 0)
    more = prompt(9)[:MORE]

    async def second_turn(first):
        headers, text = await regions.ask([*first, *more], "home")
        assert headers["x-prfaas-prefill"] == "p-home"
        assert text == (await regions.ask([*first, *more], "local"))[1]
        return f"fetch={PROMPT // 64 * 64}" in headers["x-prfaas-decision"]

    assert await second_turn(prompts[0]), cluster.logs()
    regions.change(SLOW)
    await regions.use_line(range(100, 108), lambda bytes_per_s: bytes_per_s < 10e6)
    assert not await second_turn(prompts[1]), cluster.logs()
    regions.change(FAST)
    await regions.use_line(range(200, 208), lambda bytes_per_s: bytes_per_s > 25e6)
    assert await second_turn(prompts[2]), cluster.logs()
    assert await regions.fetches() == {'outcome="done"': 2}


def measured(metrics):
    """Bytes/s that decisions reckon the way home to carry, when it isn't the assumed rate any more."""
    rates = metrics.get("prfaas_router_link_bytes_per_s", {})
    found = rates.get('source="dense",target="home"', ASSUMED)
    return 0 if found == ASSUMED else found
