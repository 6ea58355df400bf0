"""Real vLLMs, one for each role, each on a core of its own, with our nodes beside them and a WAN between."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.e2e.conftest import Cluster, Process, free_ports

REPOSITORY = Path(__file__).parents[2]
START_S = 240.0
CORES = os.cpu_count() or 1
MAX_MODEL_TOKENS = 4096


PASSAGE = (
    "The history of computing began long before electronic machines. Charles Babbage designed the Analytical Engine, "
    "and Ada Lovelace wrote what many consider the first program. The lighthouse keeper wrote the weather down every "
    "morning, and every evening he read it back to the sea. Nobody answered, but the sea was calm on most days. "
)
LENGTHS = (1, 2, 31, 32, 33, 100, 127, 128, 129, 130, 257, 700, 1024, 2049, 3000)
NEAR_TIE = 0.13
"""In logprob: one step of bf16 where the logits are (16 to 32); the order of sums differs with the batch."""
ADAPTER = "tale"
TEMPLATE = (
    "{% if tools %}You have tools. {% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\nIt is {{ m.role }} who says: {{ m.content }}<|im_end|>\n"
    "{% endfor %}"
    "<|im_start|>assistant\n"
)
SLOW = {"kv_connector": "SlowConnector", "kv_connector_module_path": "tests.vllm.slow_connector"}


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
            *("setsid", "env", *(f"{key}={value}" for key, value in environment.items())),
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model),
            *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model"),
            *("--max-model-len", str(MAX_MODEL_TOKENS), "--kv-transfer-config", config),
            *arguments,
        ]
        self.process = Process(f"vllm-{name}", command, self.url, folder / f"vllm-{name}.log", own=True)

    def kill(self) -> None:
        """All of its processes, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @contextlib.contextmanager
    def slowly(self) -> Iterator[None]:
        """Its layers take 30 ms more meanwhile (SlowConnector)."""
        flag = Path(self.control) / "slow"
        flag.touch()
        try:
            yield
        finally:
            flag.unlink()

    async def idle(self, session: aiohttp.ClientSession) -> None:
        """Until it has no request, and every KV block is free."""
        gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        deadline = time.monotonic() + 30.0
        found: dict[str, float] = {}
        while time.monotonic() < deadline:
            found = {name: await self.gauge(session, name) for name in gauges}
            if not any(found.values()):
                return
            # A poll, since it can only be asked.
            await asyncio.sleep(0.2)
        pytest.fail(f"vLLM does not come to rest: {found}\n{self.process.tail(20)}")

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

    async def chat(self, session: aiohttp.ClientSession, content: str, **fields: Any) -> Any:
        """What vLLM answers by itself."""
        body = {"model": "model", "messages": [{"role": "user", "content": content}], "temperature": 0} | fields
        async with session.post(self.url + "/v1/chat/completions", json=body) as response:
            answer = await response.json()
            assert response.status == 200, answer
            return answer

    async def gauge(self, session: aiohttp.ClientSession, name: str) -> float:
        async with session.get(self.url + "/metrics") as response:
            text = await response.text()
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + "{"))


class VllmCluster(Cluster):
    """`servers`: the vLLM of each role."""

    start_s = START_S

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

    def _add(self, name: str, arguments: list[str], url: str) -> Process:
        """A node's own vLLM has a core, as the others have."""
        if name not in ("prefill", "decode"):
            return super()._add(name, arguments, url)
        core = 0 if name == "prefill" else 1
        bound = ["env", f"VLLM_CPU_OMP_THREADS_BIND={core % CORES}", sys.executable, "-m", *arguments]
        process = self.processes[name] = Process(name, bound, url, self.folder / f"{name}.log", own=True)
        return process

    async def start_own(self, arguments: list[str]) -> None:
        """Nodes that start a vLLM each."""
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1"}
        os.environ.update(environment)
        try:
            await self.start(
                ["--engine", "vllm", "--model", self.model, "--engine-arena-bytes", "512M"],
                ["--model", self.model],
                rate_mbit=1000,
                prefill=["--vllm-arguments", shlex.join(arguments)],
                decode=["--vllm-arguments", shlex.join(arguments)],
            )
        finally:
            for name in environment:
                del os.environ[name]

    async def wait_for_models(self, names: set[str]) -> None:
        """Until the router serves these too: it hears of them with the nodes' heartbeats."""
        deadline = time.monotonic() + 30.0
        served: set[str] = set()
        while time.monotonic() < deadline:
            async with self.session.get(self.router_url + "/v1/models") as response:
                served = {each["id"] for each in (await response.json())["data"]}
            if names <= served:
                return
            # A poll, since it can only be asked.
            await asyncio.sleep(0.1)
        pytest.fail(f"the router serves {served}, not {names}\n{self.logs()}")

    async def alone(self, prompt: list[int], tokens: int) -> Any:
        """What the decode node's vLLM answers when it prefills the prompt itself; with logprobs."""
        body = {"model": await self.models(), "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        body |= {"ignore_eos": True, "logprobs": 2, "cache_salt": uuid.uuid4().hex}
        headers = {"x-prfaas-pin-route": "local"}
        async with self.session.post(self.router_url + "/v1/completions", json=body, headers=headers) as response:
            answer = await response.json()
            assert response.status == 200, f"{answer}\n{self.logs()}"
            return answer["choices"][0]

    async def mend(self) -> None:
        """What has been killed is started again."""
        dead = [server for server in self.servers.values() if not server.process.alive]
        if not dead and all(process.alive for process in self.processes.values()):
            return
        for server in dead:
            server.process.start()
        await asyncio.gather(*(server.ready(self.session) for server in dead))
        self.stop_nodes()
        await self.start_nodes()

    async def start_nodes(
        self,
        decode: list[str] | None = None,
        rate_mbit: float = 1000,
        delay_ms: float = 5,
        engines: tuple[str, str] = ("vllm", "vllm"),
    ) -> None:
        """Router, WAN and a node for each role. decode: further flags of the decode node. engines: of prefill and
        decode."""
        of = {role: ["--engine", kind] for role, kind in zip(("prefill", "decode"), engines, strict=True)}
        for role, server in self.servers.items():
            if of[role] == ["--engine", "vllm"]:
                of[role] += ["--vllm-url", server.url, "--vllm-control", server.control]
        await self.start(
            ["--model", self.model, "--engine-arena-bytes", "512M"],
            ["--model", self.model, "--router-continue-wait-s", "1"],
            rate_mbit=rate_mbit,
            delay_ms=delay_ms,
            prefill=of["prefill"],
            decode=[*of["decode"], *(decode or [])],
        )

    def close(self) -> None:
        for server in self.servers.values():
            server.kill()
        super().close()

    def stop_nodes(self) -> None:
        """All but the vLLMs."""
        for name in [name for name in self.processes if not name.startswith("vllm-")]:
            self.processes.pop(name).kill()

    async def timeline(self, request_id: str) -> dict[str, Any]:
        async with self.session.get(f"{self.router_url}/requests/{request_id}/timeline") as response:
            return dict(await response.json())

    async def idle(self) -> None:
        """Until no vLLM that lives has a request or a block in use."""
        for server in self.servers.values():
            if server.process.alive:
                await server.idle(self.session)

    async def chat(self, content: str, expected: int = 200, **fields: Any) -> dict[str, Any]:
        """A chat whose KV comes from the prefill node: the whole answer, its headers too."""
        messages = [{"role": "user", "content": content}]
        body = {"model": await self.models(), "messages": messages, "temperature": 0} | fields
        async with self.session.post(
            self.router_url + "/v1/chat/completions", json=body, headers={"x-prfaas-pin-route": "offload"}
        ) as response:
            answer = dict(await response.json())
            assert response.status == expected, f"{response.status}: {answer}\n{self.logs()}"
            return answer | {"headers": {k.lower(): v for k, v in response.headers.items()}}

    async def offloaded(self, prompt: list[int], tokens: int, pin: bool = True, **fields: Any) -> dict[str, Any]:
        """A completion whose KV comes from the prefill node; unless pinned, as long as there is one."""
        body = {"model": await self.models(), "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        body |= {"ignore_eos": True} | fields
        headers = {"x-prfaas-pin-route": "offload"} if pin else {}
        async with self.session.post(self.router_url + "/v1/completions", json=body, headers=headers) as response:
            answer = await response.json()
            assert response.status == 200, f"{response.status}: {answer}\n{self.logs()}"
            return dict(answer["choices"][0]) | {"headers": {k.lower(): v for k, v in response.headers.items()}}


@contextlib.asynccontextmanager
async def cluster_of(model: Path, folder: Path) -> AsyncIterator[VllmCluster]:
    """Not started."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        made = VllmCluster(folder, session, str(model))
        try:
            yield made
        finally:
            made.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def smollm2(smollm2_dir: Path, tmp_path_factory: Any) -> AsyncIterator[VllmCluster]:
    """The real model, eager, without prefix caching; prefill can be made slow (`slowly`)."""
    # A short path: control sockets have at most 107 bytes.
    folder = tmp_path_factory.mktemp("v")
    # Not the model's own, which the router knows.
    (folder / "template.jinja").write_text(TEMPLATE)
    template = ["--chat-template", str(folder / "template.jinja")]
    tools = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    async with cluster_of(smollm2_dir, folder) as cluster:
        make_adapter(smollm2_dir, folder / ADAPTER)
        lora = ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"{ADAPTER}={folder / ADAPTER}"]
        await cluster.start_vllm(["--enforce-eager", "--no-enable-prefix-caching", *template, *tools, *lora], SLOW)
        yield cluster


@pytest_asyncio.fixture(loop_scope="session")
async def vllm_cluster(smollm2: VllmCluster) -> VllmCluster:
    """As `smollm2`, with all processes alive, whatever the test before has killed."""
    await smollm2.mend()
    return smollm2


@pytest.fixture(scope="session")
def prompts(smollm2_dir: Path) -> dict[int, list[int]]:
    """By number of tokens."""
    from prfaas.services.engine.tokenizer import load_tokenizer

    ids = load_tokenizer(str(smollm2_dir)).encode(PASSAGE * 60)
    return {length: ids[length % 7 : length % 7 + length] for length in LENGTHS}


def make_adapter(model: Path, directory: Path) -> None:
    """A random LoRA adapter, strong enough to say something else."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden = config["hidden_size"]
    key_size = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    torch.manual_seed(0)
    tensors, rank = {}, 8
    for layer in range(config["num_hidden_layers"]):
        for name, size in (("q_proj", hidden), ("v_proj", key_size)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, hidden) * 0.1
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(size, rank) * 0.2
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    description = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    description |= {"bias": "none", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(model)}
    (directory / "adapter_config.json").write_text(json.dumps(description))


def descendants(pid: int) -> list[int]:
    """Processes that it has started, and theirs."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, left = [], [pid]
    while left:
        more = children.get(left.pop(), [])
        found += more
        left += more
    return found


def near_tie(choice: Any, text: str) -> float | None:
    """None: `text` is what vLLM says alone. Else the margin, in logprob, of the token at which they part."""
    logprobs = choice["logprobs"]
    if "message" in choice:
        said, tokens = choice["message"]["content"], [each["token"] for each in logprobs["content"]]
        best = [[top["logprob"] for top in each["top_logprobs"]] for each in logprobs["content"]]
    else:
        said, tokens = choice["text"], logprobs["tokens"]
        best = [list(top.values()) for top in logprobs["top_logprobs"]]
    if said == text:
        return None
    so_far = ""
    for token, top in zip(tokens, best, strict=True):
        so_far += token
        if not text.startswith(so_far):
            first, second, *_ = sorted(top, reverse=True)
            return float(first - second)
    return float("inf")


def report(line: dict[str, Any]) -> None:
    """For whoever reads the run's output (-s)."""
    print(json.dumps(line))
