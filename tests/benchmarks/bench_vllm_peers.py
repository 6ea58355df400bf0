"""Time to the first token over an emulated WAN: real vLLMs with our connector, and with vLLM's own NixlConnector.

    sudo .venv-vllm/bin/python -m tests.benchmarks.bench_vllm_peers [--rounds 5] [--rate-mbit 1000] [--rtt-ms 20]

Two hosts (network namespaces) joined by an emulated link; on one the prefill vLLM, on the other the decode vLLM and the
client; each vLLM has a core. Of NIXL the client is also the proxy, as in vLLM's example: prefill with one token, then
decode with the parameters that came back. Of ours it asks the router. SmolLM2 in bf16, eager, no prefix caching; each
prompt is new. NIXL comes from its wheel (nixl-cu12, which does without CUDA between host memories), UCX over TCP.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
from prfaas.services.engine.tokenizer import load_tokenizer
from prfaas.services.model_store import ensure_model
from prfaas.services.vllm.process import transfer_config

from tests.e2e.conftest import Process
from tests.vllm.conftest import PASSAGE, REPOSITORY
from tests.wan_link import FAR_ADDRESS, NEAR_ADDRESS, Host, WanLink, wan_link

NIXL = ("nixl==1.5.1", "nixl-cu12==1.5.1")
SIZES = (128, 512, 2000, 3500)
READY_S = 300.0
VLLM_PORT, NODE_PORT, ROUTER_PORT, SIDE_CHANNEL_PORT = 8100, 8001, 8000, 5600
Ask = Callable[[list[int]], Awaitable[float]]


class Bench:
    """One system, up on both hosts."""

    def __init__(self, link: WanLink, folder: Path, packages: Path, model: str, session: aiohttp.ClientSession) -> None:
        """packages: where NIXL is."""
        self.packages = packages
        self.hosts = {"prefill": link.far, "decode": link.near}
        self.addresses = {"prefill": FAR_ADDRESS, "decode": NEAR_ADDRESS}
        self.folder, self.model, self.session = folder, model, session
        self.processes: list[Process] = []

    def start(self, name: str, host: Host, environment: dict[str, str], *command: str) -> Process:
        settings = [f"{key}={value}" for key, value in environment.items()]
        whole = ["setsid", "--wait", *host.command("env", *settings, *command)]
        process = Process(name, whole, "", self.folder / f"{name}.log", own=True)
        self.processes.append(process)
        return process

    def start_vllm(self, role: str, config: str, environment: dict[str, str]) -> None:
        core = str(0 if role == "prefill" else (os.cpu_count() or 1) - 1)
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_HOST_IP": self.addresses[role],
            "VLLM_CPU_OMP_THREADS_BIND": core,
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONPATH": str(REPOSITORY),
        } | environment
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", self.model]
        command += ["--host", self.addresses[role], "--port", str(VLLM_PORT), "--served-model-name", "model"]
        command += ["--max-model-len", "4096", "--enforce-eager", "--no-enable-prefix-caching"]
        self.start(f"vllm-{role}", self.hosts[role], environment, *command, "--kv-transfer-config", config)

    def url(self, role: str) -> str:
        return f"http://{self.addresses[role]}:{VLLM_PORT}"

    async def ready(self, url: str) -> None:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline and all(process.alive for process in self.processes):
            with contextlib.suppress(aiohttp.ClientError):
                async with self.session.get(url) as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.3)
        tails = "\n".join(f"--- {process.name}\n{process.tail(25)}" for process in self.processes)
        raise RuntimeError(f"{url} is not there\n{tails}")

    def close(self) -> None:
        for process in self.processes:
            subprocess.run(["pkill", "-KILL", "--session", str(process.pid)], check=False)
            process.kill()

    async def first_token(self, url: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        async with self.session.post(url, json=body | {"stream": True}, headers=headers) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if line.startswith(b"data:"):
                    assert b'"error"' not in line, line
                    return


async def ours(bench: Bench) -> Ask:
    secret = bench.folder / "secret"
    secret.write_text("bench-" + os.urandom(16).hex())
    common = ["--secret-file", str(secret), "--log-level", "warning"]
    prfaas = [sys.executable, "-m", "prfaas.services"]
    for role in ("prefill", "decode"):
        bench.start_vllm(role, transfer_config(str(bench.folder / role)), {})
    router = f"http://{NEAR_ADDRESS}:{ROUTER_PORT}"
    bind = ["--bind", f"{NEAR_ADDRESS}:{ROUTER_PORT}", "--model", bench.model]
    bench.start("router", bench.hosts["decode"], {}, *prfaas, "router", *bind, *common)
    for role in ("prefill", "decode"):
        await bench.ready(bench.url(role) + "/health")
        address = bench.addresses[role]
        node = [
            "--engine",
            "vllm",
            "--model",
            bench.model,
            "--vllm-url",
            bench.url(role),
            "--engine-arena-bytes",
            "512M",
        ]
        node += [
            "--vllm-control",
            str(bench.folder / role),
            "--name",
            f"{role}-1",
            "--region",
            role,
            "--routers",
            router,
        ]
        node += ["--bind", f"{address}:{NODE_PORT}", "--kv-bind", f"{address}:9001"]
        bench.start(role, bench.hosts[role], {}, *prfaas, role, *node, *common)
    await bench.ready(router + "/readyz")
    await asyncio.sleep(5)  # the prefill node's registration, and lanes

    async def ask(prompt: list[int]) -> float:
        began_s = time.perf_counter()
        model = Path(bench.model).name
        body = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        await bench.first_token(router + "/v1/completions", body, {"x-prfaas-pin-route": "offload"})
        return time.perf_counter() - began_s

    return ask


async def nixl(bench: Bench) -> Ask:
    config = json.dumps({"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"})
    for role in ("prefill", "decode"):
        environment = {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": bench.addresses[role],
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(SIDE_CHANNEL_PORT),
            "PYTHONPATH": str(bench.packages),
            "UCX_TLS": "tcp",
        }
        bench.start_vllm(role, config, environment)
    for role in ("prefill", "decode"):
        await bench.ready(bench.url(role) + "/health")
    remote = {"do_remote_decode": True, "do_remote_prefill": False}
    remote |= {f"remote_{what}": None for what in ("engine_id", "block_ids", "host", "port")}

    async def ask(prompt: list[int]) -> float:
        began_s = time.perf_counter()
        body = {"model": "model", "prompt": prompt, "max_tokens": 1, "temperature": 0, "kv_transfer_params": remote}
        async with bench.session.post(bench.url("prefill") + "/v1/completions", json=body) as response:
            answer = await response.json()
            assert response.status == 200, answer
        params = answer["kv_transfer_params"]
        assert (params or {}).get("do_remote_prefill"), answer
        body |= {"max_tokens": 4, "ignore_eos": True, "kv_transfer_params": params}
        await bench.first_token(bench.url("decode") + "/v1/completions", body)
        return time.perf_counter() - began_s

    return ask


async def measure(ask: Ask, ids: list[int], rounds: int, offset: int) -> Iterator[tuple[int, list[float]]]:
    """Of each size; the first prompt of all (handshakes, warm-up) isn't counted."""
    await ask(ids[offset : offset + 600])
    results = []
    for size in SIZES:
        starts = [offset + 7 * (i + 1) for i in range(rounds)]
        results.append((size, [await ask(ids[start : start + size]) for start in starts]))
    return iter(results)


async def main(arguments: argparse.Namespace, link: WanLink, packages: Path) -> None:
    model = str(ensure_model("smollm2"))
    ids = load_tokenizer(model).encode(PASSAGE * 80)
    found: dict[str, dict[int, list[float]]] = {}
    timeout = aiohttp.ClientTimeout(total=600)
    for name, system in (("PrfaaS", ours), ("NixlConnector", nixl)):
        # Control sockets have short paths.
        with tempfile.TemporaryDirectory() as folder:
            async with aiohttp.ClientSession(timeout=timeout) as session:
                bench = Bench(link, Path(folder), packages, model, session)
                try:
                    found[name] = dict(await measure(await system(bench), ids, arguments.rounds, len(found)))
                finally:
                    bench.close()
    conditions = f"{arguments.rate_mbit:g} Mbit/s, rtt {arguments.rtt_ms:g} ms"
    print(f"TTFT in s, medians of {arguments.rounds} (min to max); {conditions}")
    for size in SIZES:
        cells = []
        for name, results in found.items():
            times = results[size]
            cells.append(f"{name} {statistics.median(times):6.3f} ({min(times):.3f} to {max(times):.3f})")
        first, second = (statistics.median(results[size]) for results in found.values())
        print(f"{size:5} tokens   {'   '.join(cells)}   ratio {first / second:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rate-mbit", type=float, default=1000)
    parser.add_argument("--rtt-ms", type=float, default=20)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as target:
        install = ["install", "--quiet", "--no-deps", "--target", target, *NIXL]
        subprocess.run([sys.executable, "-m", "pip", *install], check=True)
        with wan_link(rate_bits_per_s=given.rate_mbit * 1e6, rtt_s=given.rtt_ms / 1e3) as made:
            made.near.enter()
            asyncio.run(main(given, made, Path(target)))
