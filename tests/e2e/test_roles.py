"""Nodes change their role under load, real processes, two routers: nothing is lost, one router at a time decides."""

from __future__ import annotations

import asyncio
import json
import random

import pytest
from prfaas.services.engine.emulated.output import OutputTokens

from tests.e2e.conftest import free_ports

pytestmark = pytest.mark.deploy

HERE = "127.0.0.1"
# A prefill node computes 5 prompts of 1,000 tokens a second; a decode node generates 4 answers of 100 tokens.
ENGINE = ["--engine", "emulated", "--engine-prefill-tokens-per-s", "5000", "--engine-decode-step-s", "0.02"]
ENGINE += ["--engine-max-batch", "8", "--engine-arena-bytes", "64M", "--engine-prefix-bytes", "0"]
ENGINE += ["--node-heartbeat-s", "0.25"]
PLANNER = {"period-s": "1", "confirmations": "1", "cool-down-s": "2", "min-requests": "8", "demand-s": "5"}
PLANNER |= {"switch-s": "1", "lease-s": "2", "busy-queue-s": "0.5"}
LONG_PROMPTS, LONG_ANSWERS = (1000, 8), (50, 100)
"""Tokens of prompt and output: of the first kind prefill is short, of the second decode."""


class Cluster:
    """A home region of four nodes, one of which prefills, and two routers that plan."""

    def __init__(self, cluster):
        self.processes = cluster
        self.session = cluster.session
        names = ["r1", "r2", "n1", "n2", "n3", "n4"]
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.nodes = names[2:]

    def url(self, name):
        return f"http://{HERE}:{self.ports[name]}"

    async def start(self):
        cluster = self.processes
        planner = [word for key, value in PLANNER.items() for word in (f"--planner-{key}", value)]
        for name in ("r1", "r2"):
            flags = ["--bind", f"{HERE}:{self.ports[name]}", "--model", "bytes", "--router-name", name]
            flags += ["--router-timelines", "0", *planner]
            cluster._add(name, ["prfaas.services", "router", *flags, *cluster._secret], self.url(name))
        for name in self.nodes:
            role = "prefill" if name == "n1" else "decode"
            flags = ["--name", name, "--region", "home", "--bind", f"{HERE}:{self.ports[name]}"]
            flags += ["--kv-bind", f"{HERE}:0", "--routers", f"{self.url('r1')},{self.url('r2')}"]
            cluster._add(name, ["prfaas.services", role, *flags, *cluster._secret, *ENGINE], self.url(name))
        for router in ("r1", "r2"):
            await self.split(router, 1, 3)

    async def split(self, router, prefill, decode):
        """Until a router sees so many usable nodes in each role."""
        nodes = {'role="prefill",state="usable"': prefill, 'role="decode",state="usable"': decode}
        await self.processes.wait_for(
            lambda m: all(m.get("prfaas_router_nodes", {}).get(key, 0) == count for key, count in nodes.items()), router
        )

    async def plan(self, router):
        async with self.session.get(self.url(router) + "/plan") as response:
            assert response.status == 200
            return await response.json()

    async def holder(self, routers):
        """The one router that plans."""
        async with asyncio.timeout(20):
            while True:
                mine = [name for name in routers if (await self.plan(name))["lease"]["mine"]]
                assert len(mine) <= 1
                if mine:
                    return mine[0]
                await asyncio.sleep(0.05)  # a poll: the state can only be asked for

    async def ask(self, router, prompt, output):
        """One streamed answer, which must be whole and right."""
        body = {"model": "emulated", "prompt": prompt, "max_tokens": output, "temperature": 0, "stream": True}
        text = ""
        async with self.session.post(self.url(router) + "/v1/completions", json=body) as response:
            assert response.status == 200, f"{await response.text()}\n{self.processes.logs()}"
            async for line in response.content:
                if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                    chunk = json.loads(line[6:])
                    assert "error" not in chunk, f"{chunk}\n{self.processes.logs()}"
                    text += chunk["choices"][0]["text"]
        expected = OutputTokens(prompt, None)
        assert text == bytes(expected.token(i) for i in range(output)).decode()

    async def load(self, routers, kind, clients, until, rng):
        """Clients that ask one thing after the other, until something has happened; how many answers there were."""
        prompt_tokens, output = kind
        happened = asyncio.create_task(until)
        answers = 0

        async def client(i):
            nonlocal answers
            while not happened.done():
                prompt = [rng.randrange(32, 127) for _ in range(prompt_tokens)]
                await self.ask(routers[i % len(routers)], prompt, output)
                answers += 1

        await asyncio.gather(*(client(i) for i in range(clients)))
        await happened
        return answers


async def role_calls(cluster, router):
    """Nodes that a router has told to change their role, and that have said yes."""
    counted = (await cluster.processes.metrics(router)).get("prfaas_router_role_calls_total", {})
    return {labels.split('"')[3]: count for labels, count in counted.items() if 'outcome="draining"' in labels}


@pytest.mark.timeout(180)
async def test_roles_follow_the_load_and_no_request_is_lost(cluster):
    """Long prompts: decode nodes come to prefill, one after the other. The router that told them dies. Long answers:
    they go back, by the word of the other router. Each answer in between is whole and right."""
    rng = random.Random(1)
    home = Cluster(cluster)
    await home.start()
    first = await home.holder(("r1", "r2"))
    (second,) = {"r1", "r2"} - {first}
    assert await home.load(("r1", "r2"), LONG_PROMPTS, 16, home.split(second, 3, 1), rng) > 20
    assert await role_calls(home, first) == {"prefill": 2}
    assert await role_calls(home, second) == {}
    assert [past["to_prefill"] for past in (await home.plan(first))["history"] if past["to_prefill"]] == [1, 1]

    cluster.processes[first].kill()
    assert await home.load((second,), LONG_ANSWERS, 40, home.split(second, 1, 3), rng) > 20
    assert await role_calls(home, second) == {"decode": 2}
    assert await home.holder((second,)) == second
    changes = [
        count
        for node in home.nodes
        for labels, count in (await cluster.metrics(node)).get("prfaas_node_role_changes_total", {}).items()
        if 'outcome="done"' in labels
    ]
    assert sum(changes) == 4
