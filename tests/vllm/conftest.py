"""Real vLLMs, one for each role, each on a core of its own, with our nodes beside them and a WAN between."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.e2e.conftest import Cluster, Process, free_ports
from tests.tiny_models import add_tokenizer, make_tiny_model

REPOSITORY = Path(__file__).parents[2]
START_S = 240.0
CORES = os.cpu_count() or 1
MAX_MODEL_TOKENS = 4096


class VllmServer:
    """A `vllm serve` with our connector, as a user would run it."""

    def __init__(
        self, name: str, folder: Path, model: str, core: int, arguments: list[str], connector: dict[str, str]
    ) -> None:
        """connector: of --kv-transfer-config, what is to differ."""
        from prfaas.services.vllm.process import transfer_config

        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self.control = str(folder / f"{name}-control")
        config = json.dumps(json.loads(transfer_config(self.control)) | connector)
        environment = {
            "PYTHONPATH": str(REPOSITORY),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_CPU_OMP_THREADS_BIND": str(core % CORES),
            "VLLM_NO_USAGE_STATS": "1",
        }
        command = [
            *("env", *(f"{key}={value}" for key, value in environment.items())),
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model),
            *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model"),
            *("--max-model-len", str(MAX_MODEL_TOKENS), "--kv-transfer-config", config),
            *arguments,
        ]
        self.process = Process(f"vllm-{name}", command, self.url, folder / f"vllm-{name}.log", own=True)

    async def ready(self, session: aiohttp.ClientSession) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.alive:
            try:
                async with session.get(self.url + "/health") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            # A poll, since it can only be asked.
            await asyncio.sleep(0.2)
        pytest.fail(f"vLLM did not start\n{self.process.tail(40)}")

    async def complete(self, session: aiohttp.ClientSession, prompt: list[int], tokens: int, **fields: Any) -> Any:
        """What vLLM answers by itself: its choice, with token ids and the two best logprobs of each token."""
        body = {"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        body |= {"return_token_ids": True, "logprobs": 2} | fields
        async with session.post(self.url + "/v1/completions", json=body) as response:
            answer = await response.json()
            assert response.status == 200, answer
            return answer["choices"][0]

    async def gauge(self, session: aiohttp.ClientSession, name: str) -> float:
        async with session.get(self.url + "/metrics") as response:
            text = await response.text()
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + "{"))


class VllmCluster(Cluster):
    """`servers`: the vLLM of each role."""

    def __init__(self, folder: Path, session: aiohttp.ClientSession, model: str) -> None:
        super().__init__(folder, session)
        self.model = model
        self.servers: dict[str, VllmServer] = {}

    async def start_vllm(self, arguments: list[str], prefill_connector: dict[str, str] | None = None) -> None:
        """Two vLLMs, and nodes beside them."""
        for core, role in enumerate(("prefill", "decode")):
            connector = (prefill_connector or {}) if role == "prefill" else {}
            server = VllmServer(role, self.folder, self.model, core, arguments, connector)
            self.servers[role] = server
            self.processes[f"vllm-{role}"] = server.process
        await asyncio.gather(*(server.ready(self.session) for server in self.servers.values()))
        await self.start_nodes()

    async def start_nodes(
        self, decode: list[str] | None = None, rate_mbit: float = 1000, delay_ms: float = 5
    ) -> None:
        """Router, WAN and a node for each role; `decode`: further flags of the decode node."""
        of = {role: ["--vllm-url", s.url, "--vllm-control", s.control] for role, s in self.servers.items()}
        await self.start(
            ["--engine", "vllm", "--model", self.model, "--engine-arena-bytes", "512M"],
            ["--model", self.model],
            rate_mbit=rate_mbit,
            delay_ms=delay_ms,
            prefill=of["prefill"],
            decode=[*of["decode"], *(decode or [])],
        )

    def stop_nodes(self) -> None:
        """All but the vLLMs."""
        for name in [name for name in self.processes if not name.startswith("vllm-")]:
            self.processes.pop(name).kill()

    async def offloaded(self, prompt: list[int], tokens: int, **fields: Any) -> dict[str, Any]:
        """A completion whose KV comes from the prefill node."""
        body = {"model": await self.models(), "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        body |= {"ignore_eos": True} | fields
        headers = {"x-prfaas-pin-route": "offload"}
        async with self.session.post(self.router_url + "/v1/completions", json=body, headers=headers) as response:
            answer = await response.json()
            assert response.status == 200, f"{response.status}: {answer}\n{self.logs()}"
            return dict(answer["choices"][0]) | {"headers": {k.lower(): v for k, v in response.headers.items()}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vllm_cluster(request: pytest.FixtureRequest, tmp_path_factory: Any) -> AsyncIterator[VllmCluster]:
    """Not started. Indirect parameter: a tiny model's type; by default it is the real one."""
    folder = tmp_path_factory.mktemp("v")
    if model_type := getattr(request, "param", None):
        model = folder / f"tiny-{model_type}"
        make_tiny_model(model_type, model)
        add_tokenizer(model)
    else:
        model = request.getfixturevalue("smollm2_dir")
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        made = VllmCluster(folder, session, str(model))
        try:
            yield made
        finally:
            made.close()


def near_tie(choice: Any, text: str) -> float | None:
    """None: `text` is what vLLM says alone. Else the margin, in logprob, of the token at which they part."""
    said = choice["text"]
    if said == text:
        return None
    so_far = ""
    for token, best in zip(choice["logprobs"]["tokens"], choice["logprobs"]["top_logprobs"], strict=True):
        so_far += token
        if not text.startswith(so_far):
            first, second, *_ = sorted(best.values(), reverse=True)
            return float(first - second)
    return float("inf")


def report(line: dict[str, Any]) -> None:
    """For whoever reads the run's output (-s)."""
    print(json.dumps(line))
