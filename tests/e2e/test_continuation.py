"""Nodes die, hang and are cut off under running streams, real processes: every stream ends as if nothing had been."""

from __future__ import annotations

import asyncio
import json
import random
import signal

import pytest
from prfaas.services.engine.emulated.output import OutputTokens

from tests.e2e.conftest import free_ports

pytestmark = pytest.mark.deploy

HERE = "127.0.0.1"
ENGINE = ["--engine", "emulated", "--engine-decode-step-s", "0.02", "--engine-prefill-tokens-per-s", "20000"]
ENGINE += ["--engine-arena-bytes", "128M", "--engine-prefix-bytes", "16M", "--node-heartbeat-s", "0.25"]
ROUTER = ["--model", "bytes", "--router-node-silent-s", "2.5", "--router-decode-attempts", "20"]
ROUTER += ["--router-continue-wait-s", "40", "--router-timelines", "5000"]
STREAMS, AT_ONCE, TOKENS = 200, 24, 48
"""At least so many streams: new ones begin until all troubles are over, since a node takes seconds to come back."""
TROUBLES = 12
PREFILLS, DECODES = ("p1", "p2"), ("d1", "d2", "d3")
CUT = {"d3": "wan-d3", "p2": "wan-p2"}
"""Nodes that are reached through a WAN process of their own, which can be taken away."""


async def start(cluster):
    """A router, two prefill nodes, three decode nodes; one of each behind a line that can be cut."""
    names = [*PREFILLS, *DECODES]
    ports = dict(zip(["router", *names], free_ports(1 + len(names)), strict=True))
    kv = dict(zip(names, free_ports(len(names)), strict=True))
    lines = dict(zip(CUT, zip(free_ports(len(CUT)), free_ports(len(CUT)), strict=True), strict=True))
    cluster.router_url = f"http://{HERE}:{ports['router']}"
    router = ["prfaas.services", "router", "--bind", f"{HERE}:{ports['router']}", *cluster._secret, *ROUTER]
    cluster._add("router", router, cluster.router_url)
    for name, (http, lanes) in lines.items():
        wan = ["prfaas.services.wan.proxy", "--rate-mbit", "2000", "--delay-ms", "1"]
        wan += ["--forward", f"{HERE}:{http}={HERE}:{ports[name]}", "--forward", f"{HERE}:{lanes}={HERE}:{kv[name]}"]
        cluster._add(CUT[name], wan, "")
    for name in names:
        role = "prefill" if name in PREFILLS else "decode"
        node = ["prfaas.services", role, "--name", name, "--region", "away" if role == "prefill" else "home"]
        node += ["--bind", f"{HERE}:{ports[name]}", "--kv-bind", f"{HERE}:{kv[name]}", "--routers", cluster.router_url]
        if name in lines:
            http, lanes = lines[name]
            node += ["--advertise", f"http://{HERE}:{http}", "--kv-advertise", f"{HERE}:{lanes}"]
        cluster._add(name, [*node, *cluster._secret, *ENGINE], f"http://{HERE}:{ports[name]}")
    await cluster.wait_for(lambda m: usable(m, "prefill") == len(PREFILLS) and usable(m, "decode") == len(DECODES))


def usable(metrics, role):
    return metrics.get("prfaas_router_nodes", {}).get(f'role="{role}",state="usable"', 0)


class Streams:
    """The clients. chunks: delivered so far, of all of them."""

    def __init__(self, cluster, rng):
        self.cluster, self.rng = cluster, rng
        self.chunks = 0
        self.news = asyncio.Event()
        self.request_ids = []
        self.results = []
        self.troubled = True

    async def client(self):
        """One stream after the other."""
        while self.troubled or len(self.results) < STREAMS:
            prompt = [self.rng.randrange(32, 127) for _ in range(self.rng.randrange(50, 1500))]
            self.results.append((prompt, await self.one(prompt)))

    async def one(self, prompt):
        """The text of one stream, and how it ended."""
        body = {"model": "emulated", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True}
        text, ends, finish = "", 0, []
        while True:
            async with self.cluster.session.post(self.cluster.router_url + "/v1/completions", json=body) as response:
                if response.status == 503:
                    # It hasn't begun: with all decode nodes in trouble a client is told when to come again.
                    await asyncio.sleep(float(response.headers["retry-after"]))
                    continue
                assert response.status == 200, await response.text()
                self.request_ids.append(response.headers["x-request-id"])
                async for line in response.content:
                    if line == b"data: [DONE]\n":
                        ends += 1
                    elif line.startswith(b"data: "):
                        chunk = json.loads(line[6:])
                        assert "error" not in chunk, f"{chunk}\n{self.cluster.logs()}"
                        [choice] = chunk["choices"]
                        text += choice["text"]
                        finish += [choice["finish_reason"]] * bool(choice["finish_reason"])
                        self.chunks += 1
                        self.news.set()
                break
        return text, ends, finish

    async def until(self, chunks):
        """Until so many chunks have come."""
        while self.chunks < chunks:
            self.news.clear()
            await self.news.wait()


async def disturb(cluster, streams, rng):
    """One trouble after the other, at random points of what has been delivered; one decode node at a time."""
    troubles = ["kill", "stop", "cut"] * (TROUBLES // 3)
    rng.shuffle(troubles)
    done = []
    for trouble in troubles:
        await streams.until(streams.chunks + rng.randrange(1, AT_ONCE * TOKENS // 2))
        # A stream that begins while no decode node is there is refused, which is no continuation.
        await cluster.wait_for(lambda m: usable(m, "decode") == len(DECODES))
        name = rng.choice([*CUT] if trouble == "cut" else [*PREFILLS, *DECODES])
        process = cluster.processes[CUT[name] if trouble == "cut" else name]
        if trouble == "stop":
            process.signal(signal.SIGSTOP)
            reason = "prefill_unreachable" if name in PREFILLS else "decode_unreachable"
            # It goes on when the router has given it up.
            await given_up(cluster, reason)
            process.signal(signal.SIGCONT)
        else:
            process.kill()
            process.start()
        done.append((trouble, name))
    return done


async def given_up(cluster, reason):
    def count(metrics):
        return sum(
            metrics.get(f"prfaas_router_{kind}_total", {}).get(f'reason="{reason}"', 0)
            for kind in ("fallbacks", "continuations")
        )

    before = count(await cluster.metrics())
    await cluster.wait_for(lambda m: count(m) > before)


@pytest.mark.timeout(240)
async def test_every_stream_ends_as_if_nothing_had_been(cluster):
    """SIGKILL, SIGSTOP and cut lines for prefill and decode nodes at random points of some hundred streams: each ends
    with the ids of an undisturbed run, none lost, none repeated, one [DONE]; every continuation is counted by reason.
    """
    rng = random.Random(4)
    await start(cluster)
    streams = Streams(cluster, rng)
    clients = [asyncio.create_task(streams.client()) for _ in range(AT_ONCE)]
    troubles = await disturb(cluster, streams, rng)
    streams.troubled = False
    await asyncio.gather(*clients)
    assert {trouble for trouble, _ in troubles} == {"kill", "stop", "cut"}
    assert len(streams.results) >= STREAMS
    for prompt, (text, ends, finish) in streams.results:
        output = OutputTokens(prompt, None)
        assert text == bytes(output.token(i) for i in range(TOKENS)).decode()
        assert (ends, finish) == (1, ["length"])
    told: dict[str, int] = {}
    for request_id in streams.request_ids:
        async with cluster.session.get(f"{cluster.router_url}/requests/{request_id}/timeline") as response:
            timeline = await response.json()
        assert len(timeline["output_token_ids"]) == TOKENS
        for fallback in timeline["fallbacks"]:
            if fallback.startswith("continued_"):
                told[fallback.removeprefix("continued_")] = told.get(fallback.removeprefix("continued_"), 0) + 1
    counted = (await cluster.metrics()).get("prfaas_router_continuations_total", {})
    assert told == {labels.split('"')[1]: count for labels, count in counted.items() if count}
    assert sum(told.values()) > 0, f"no stream was continued: {troubles}"
