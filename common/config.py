"""Settings: one TOML file, environment variables and flags → frozen dataclasses, all mistakes reported at once.

A key is `section.field` (`[node] kv_bind` in TOML), `PRFAAS_SECTION_FIELD` in the environment and `--section-field`
(or the field's own flag name, see `FLAG_ALIASES`) on the command line. Flags win over the environment, that over the
file, that over the defaults.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, Union

from prfaas.common.errors import ConfigError
from prfaas.common.kv_layout import TensorKind

MIB = 1 << 20
GIB = 1 << 30


def setting(default: Any, help: str, check: Callable[[Any], str | None] | None = None) -> Any:
    """A dataclass field with its help text and an optional check that returns what is wrong."""
    metadata = {"help": help, "check": check}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Between:
    """A setting's check: a number in a range, both ends included."""

    low: float
    high: float

    def __call__(self, value: float) -> str | None:
        return None if self.low <= value <= self.high else f"must be from {self.low:g} to {self.high:g}"


def _address(value: str) -> str | None:
    try:
        parse_address(value)
    except ValueError as error:
        return str(error)
    return None


def _url(value: str) -> str | None:
    return None if re.fullmatch(r"https?://[^/\s]+/?", value) else "must look like http://host:port"


def _traces_url(value: str) -> str | None:
    return None if re.fullmatch(r"https?://[^/\s]+/\S*", value) else "must look like http://host:4318/v1/traces"


def _optional(check: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    return lambda v: check(v) if v else None


def _each(check: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    return lambda values: next((f"{v!r} {problem}" for v in values if (problem := check(v))), None)


LOSSY_CODECS = ("int8", "fp8", "int4")


def parse_lossy(value: str) -> tuple[TensorKind, str]:
    """`kind=codec` → what `transport.lossy` allows. Raises ValueError."""
    kind, _, codec = value.partition("=")
    if kind not in tuple(TensorKind) or codec not in LOSSY_CODECS:
        raise ValueError(f"must be <{'|'.join(TensorKind)}>=<{'|'.join(LOSSY_CODECS)}>")
    return TensorKind(kind), codec


def _lossy(value: str) -> str | None:
    try:
        parse_lossy(value)
    except ValueError as error:
        return str(error)
    return None


def parse_address(value: str) -> tuple[str, int]:
    """`host:port`, `[v6]:port`, `[v6%interface]:port` → (host, port). Raises ValueError with what it must look like."""
    match = re.fullmatch(r"(?:\[([^\[\]\s]+)\]|([^:\[\]\s]+)):([0-9]{1,5})", value)
    if not match or int(match[3]) > 65535 or not (match[2] or _is_ipv6(match[1])):
        raise ValueError("must look like host:port, [ipv6]:port or [ipv6%interface]:port")
    return match[1] or match[2], int(match[3])


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Names other than localhost count as reachable from outside."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """What all processes of a cluster share."""

    secret: str = setting("", "the cluster secret that authenticates nodes and routers; needed outside loopback")
    secret_file: str = setting("", "a file that holds the cluster secret")
    clock_skew_s: float = setting(60.0, "how far the wall clocks of two machines may differ", Between(1, 3600))


@dataclass(frozen=True, slots=True)
class LogConfig:
    level: Literal["debug", "info", "warning", "error"] = setting("info", "the least severe level that is printed")
    format: Literal["json", "console"] = setting("json", "one JSON object a line, or text for a person")


@dataclass(frozen=True, slots=True)
class RouterConfig:
    name: str = setting("router", "this router's name, in logs and heartbeats")
    bind: str = setting("127.0.0.1:8000", "where the OpenAI API listens", _address)
    api_keys: tuple[str, ...] = setting((), "keys that clients must present; none = open (loopback only)")
    api_keys_file: str = setting(
        "",
        "a file with one API key a line; behind it name=, requests_per_min=, tokens_per_min=, first_priority=",
    )
    model_path: str = setting("", "directory with the tokenizer and chat template; `bytes` = the emulated engine's")
    served_model: str = setting("", "the model's name for clients; empty = as the nodes report it")
    policy: Literal["adaptive", "static", "homogeneous", "offload-all", "round-robin", "least-loaded"] = setting(
        "adaptive", "who prefills: by a threshold that moves with load and links, or a baseline"
    )
    offload_threshold_tokens: int = setting(
        0,
        "prompts with more uncached tokens are prefilled in the prefill region; where adaptive begins",
        Between(0, 1 << 24),
    )
    slo_ttft_s: float = setting(
        0.0, "a request that would wait longer for its first token is refused (429); 0 = none is", Between(0, 3600)
    )
    slo_prefill_factor: float = setting(
        2.0, "with router.slo_ttft_s: a prompt may take so many times its bare prefill", Between(1, 1000)
    )
    assumed_link_gbps: float = setting(
        10.0, "Gbit/s of a link between regions before it has been measured", Between(0.001, 1e6)
    )
    share_prefixes: Literal["all", "key", "none"] = setting(
        "all", "whose cached prefixes a request may use: everybody's, its API key's, or only those with its cache_salt"
    )
    prefix_index_blocks: int = setting(
        1_000_000, "prefix blocks that the router remembers, some 300 bytes each", Between(1, 1 << 28)
    )
    max_body_bytes: int = setting(16 * MIB, "largest request body", Between(1024, 1 << 30))
    default_max_output_tokens: int = setting(1024, "cap on max_tokens where the client names none", Between(1, 1 << 20))
    request_timeout_s: float = setting(600.0, "longest life of a request", Between(1, 86400))
    decode_attempts: int = setting(
        5,
        "decode nodes that a request may try, those included that it loses in the middle of its output",
        Between(1, 100),
    )
    node_silent_s: float = setting(
        10.0, "a node that writes nothing for so long is given up; nodes ping every node.ping_s", Between(0.1, 600)
    )
    continue_wait_s: float = setting(
        20.0, "how long a stream that has lost its decode node waits for another one", Between(0, 3600)
    )
    timelines: int = setting(256, "how many request timelines are kept", Between(0, 1 << 16))
    tokenizer_threads: int = setting(1, "threads for tokenizing and JSON of long prompts", Between(1, 64))
    processes: int = setting(
        1, "router processes that share the API's port; each is a router of its own", Between(1, 64)
    )
    node_port: int = setting(
        0,
        "with several processes, process 1 takes heartbeats here, 2 one above, ...; 0 = above bind's",
        Between(0, 65535),
    )
    advertise: str = setting("", "with several processes, the host under which nodes reach them; empty = bind's")
    process: int = setting(0, "set by the parent of several processes: which one this is", Between(0, 64))


@dataclass(frozen=True, slots=True)
class PlannerConfig:
    """The slow planner in the router, with router.policy = adaptive: common/scheduling/slow_planner.py and
    conversion.py say what each is for."""

    mode: Literal["convert", "threshold", "off"] = setting(
        "convert",
        "plan the threshold and nodes' roles; the threshold alone, roles are only shown; or nothing",
    )
    period_s: float = setting(60.0, "time between two plans", Between(0.1, 86400))
    min_gain: float = setting(
        0.05, "least relative rise of the requests/s carried that is worth a conversion", Between(0, 10)
    )
    switch_s: float = setting(
        60.0, "how long a node that converts is expected to serve in neither role", Between(0, 3600)
    )
    horizon_s: float = setting(
        1800.0, "a load is expected to last so long; the cost must come back within it", Between(1, 604800)
    )
    confirmations: int = setting(2, "plans in a row that must want the same direction", Between(1, 100))
    cool_down_s: float = setting(
        300.0, "from a region's last conversion, or the router's start, to the next one", Between(0, 86400)
    )
    max_nodes: int = setting(1, "most nodes that one plan converts", Between(1, 4096))
    busy_utilisation: float = setting(0.85, "a stage as busy as this needs nodes, 0 to 1", Between(0, 1))
    busy_queue_s: float = setting(5.0, "and so does one whose queue takes so long", Between(0, 3600))
    demand_s: float = setting(600.0, "requests of so long a time make the mix that is planned for", Between(1, 604800))
    min_requests: int = setting(100, "with fewer of them nothing is planned", Between(1, 4096))
    tpot_limit_s: float = setting(
        0.0, "longest decode step that a plan may count on; 0 = that of a full batch", Between(0, 60)
    )
    drain_s: float = setting(300.0, "a node whose requests don't end within so long keeps its role", Between(0, 86400))
    lease_s: float = setting(
        15.0, "how long the nodes' grant to the one router that plans lasts; some heartbeats", Between(0.5, 600)
    )


@dataclass(frozen=True, slots=True)
class NodeConfig:
    name: str = setting("", "the node's name, unique in the cluster; empty = <role>-<random>")
    region: str = setting("local", "the region that the node is in")
    bind: str = setting("127.0.0.1:0", "where the node's HTTP listens (port 0: any)", _address)
    advertise: str = setting("", "URL under which routers reach it; empty = from bind", _optional(_url))
    routers: tuple[str, ...] = setting(("http://127.0.0.1:8000",), "URLs of all routers", _each(_url))
    heartbeat_s: float = setting(2.0, "time between heartbeats", Between(0.1, 60))
    router_dead_s: float = setting(
        10.0, "leases of a router that answered no heartbeat for so long are freed", Between(1, 600)
    )
    ping_s: float = setting(2.0, "time between ping comments on an idle response", Between(0.1, 60))
    drain_s: float = setting(30.0, "on SIGTERM, how long running requests may go on", Between(0, 3600))
    max_output_tokens: int = setting(32768, "cap on a request's max_tokens", Between(1, 1 << 20))


@dataclass(frozen=True, slots=True)
class TransportConfig:
    bind: str = setting("127.0.0.1:0", "where KV lanes are accepted", _address)
    advertise: str = setting(
        "", "host:port under which other nodes dial the KV port; empty = bind", _optional(_address)
    )
    lanes: int = setting(0, "connections a session; 0 = as many as the measured bandwidth needs", Between(0, 64))
    max_lanes: int = setting(8, "most connections a session where transport.lanes is 0", Between(1, 64))
    dial: Literal["sender", "receiver"] = setting(
        "sender", "which side opens sessions: the node that sends KV, or (behind NAT) the one that receives it"
    )
    backend: Literal["tcp", "ucx"] = setting(
        "tcp", "what carries KV: tcp, or ucx (RDMA) where both ends of a session have it, else tcp"
    )
    ucx_port: int = setting(
        0, "where lanes over UCX are accepted, on the host of transport.bind; 0 = any free port", Between(0, 65535)
    )
    chunk_bytes: int = setting(MIB, "largest chunk before the codec", Between(4096, 16 * MIB))
    codec: Literal["auto", "raw", "lz4", "zstd"] = setting(
        "auto", "how chunks are compressed; auto = as measured rates of link and codecs say, for each kind of tensor"
    )
    lossy: tuple[str, ...] = setting(
        (),
        "lossy codecs that are allowed, kind=codec: key, value, latent, conv or recurrent = int8, fp8 or int4",
        _each(_lossy),
    )
    codec_threads: int = setting(0, "threads that encode and decode; 0 = half as many as cores", Between(0, 64))
    congestion_control: str = setting(
        "auto",
        "TCP_CONGESTION of lanes; auto = cubic, and bbr over a WAN that loses packets; empty = the kernel's default",
    )
    egress_bytes_per_s: float = setting(0.0, "cap on what all sessions together send; 0 = none", Between(0, 1e12))
    resume_s: float = setting(
        10.0, "how long a transfer waits for a new lane when all to the peer are lost", Between(0, 3600)
    )
    socket_buffer_bytes: int = setting(0, "SO_SNDBUF and SO_RCVBUF of lanes; 0 = the kernel's", Between(0, 1 << 30))
    credit_bytes: int = setting(64 * MIB, "bytes in flight that a receiver grants a transfer", Between(65536, 1 << 34))
    ping_s: float = setting(1.0, "time between PINGs", Between(0.05, 60))
    dead_s: float = setting(10.0, "a lane that is silent for so long is dead", Between(1, 600))
    open_timeout_s: float = setting(10.0, "how long dialling and HELLO may take", Between(0.1, 600))
    idle_s: float = setting(
        60.0, "a session that no router has listed and no transfer has used for so long is closed", Between(10, 86400)
    )
    ticket_s: float = setting(
        600.0,
        "how long a ticket is good for before its OPEN: the longest queue; its request's end makes it void sooner",
        Between(1, 86400),
    )
    max_transfers: int = setting(1024, "transfers a session may have open", Between(1, 8192))


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """PEM files of this process; all three, or none (nothing is encrypted). They are read again when they change."""

    ca_file: str = setting("", "certificates of the cluster's private CA; no other is trusted")
    cert_file: str = setting("", "this process's certificate: its name is node.name or router.name")
    key_file: str = setting("", "the certificate's private key")

    @property
    def enabled(self) -> bool:
        return bool(self.ca_file)


def _ucx_problem(transport: Mapping[str, Any], tls: Mapping[str, Any]) -> list[str]:
    if transport.get("backend") != "ucx":
        return []
    problems = []
    if any(tls.values()):
        problems.append("transport.backend = 'ucx': lanes over UCX can't be encrypted; unset tls.*, or set it to tcp")
    if transport.get("lanes") == 1:
        problems.append("transport.lanes = 1: the first lane is always TCP; transport.backend = 'ucx' needs 2 or more")
    return problems


def _tls_problem(given: Mapping[str, Any]) -> list[str]:
    missing = [f"tls.{f.name}" for f in dataclasses.fields(TlsConfig) if not given.get(f.name)]
    if len(missing) in (0, len(dataclasses.fields(TlsConfig))):
        return []
    return [
        f"{' and '.join(missing)} not set: TLS needs ca_file, cert_file and key_file (prfaas certs init makes them)"
    ]


@dataclass(frozen=True, slots=True)
class TelemetryConfig:
    otlp_endpoint: str = setting(
        "",
        "where traces go, as http://collector:4318/v1/traces; needs the extra `otel`; empty = nowhere",
        _optional(_traces_url),
    )
    sample_ratio: float = setting(
        1.0, "share of the requests that are traced, of those that come without a trace's context", Between(0, 1)
    )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    kind: Literal["transformers", "vllm", "emulated"] = setting("transformers", "which engine computes")
    model: str = setting("", "Hugging Face id or directory; `smollm2` = the demo's model")
    served_model: str = setting("", "the model's name for clients; empty = the directory's or id's name")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting("auto", "dtype of weights and KV")
    device: str = setting("cpu", "torch device")
    threads: int = setting(1, "torch threads", Between(1, 256))
    arena_bytes: int = setting(GIB, "memory for KV, touched at start", Between(MIB, 1 << 44))
    prefill_step_tokens: int = setting(512, "most prompt tokens that one prefill step computes", Between(1, 65536))
    local_prefill_step_tokens: int = setting(
        32, "the same on a node with running streams (local prefill)", Between(1, 65536)
    )
    max_batch: int = setting(64, "most requests in one decode batch", Between(1, 4096))
    max_prefills: int = setting(4, "most prefills whose steps interleave", Between(1, 256))
    priority_s: float = setting(
        10.0,
        "a request is queued as if it had come so many seconds later for each unit of its priority",
        Between(0, 1e6),
    )
    send: Literal["layerwise", "after_prefill"] = setting(
        "layerwise", "when KV leaves: each layer as it is computed, or all after prefill (a baseline)"
    )
    join: Literal["layerwise", "when_complete"] = setting(
        "layerwise", "when decode starts: as layers arrive, or when all have (a baseline)"
    )
    time_scale: float = setting(1.0, "emulated: multiplies every time", Between(0, 1e6))
    prefill_tokens_per_s: float = setting(10000.0, "emulated: prefill speed", Between(1, 1e9))
    decode_step_s: float = setting(0.02, "emulated: one decode step", Between(0, 60))
    layers: int = setting(8, "emulated: layers", Between(1, 1024))
    kv_heads: int = setting(2, "emulated: KV heads", Between(1, 1024))
    head_dim: int = setting(64, "emulated: head dimension", Between(1, 65536))
    state_bytes: int = setting(0, "emulated: recurrent state a layer", Between(0, 1 << 30))
    bytes_scale: float = setting(1.0, "emulated: multiplies the KV bytes of the profile", Between(1e-6, 1))
    profile: str = setting(
        "",
        "a shipped profile's name or a file that `prfaas profile` wrote: what routers expect of this node, "
        "and what the emulated engine emulates",
    )
    prefix_bytes: int = setting(
        256 * MIB,
        "host memory for the KV of prefixes that later prompts may share; 0 = none is kept",
        Between(0, 1 << 44),
    )
    prefix_block_tokens: int = setting(64, "tokens a prefix block; the same on all nodes", Between(16, 4096))
    max_model_tokens: int = setting(
        0, "longest prompt + output; 0 = the model's own (emulated: 262144)", Between(0, 1 << 24)
    )


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """With engine.kind = "vllm"; docs/vllm.md tells how the two go together."""

    url: str = setting(
        "", "the OpenAI server of a vLLM that runs already; empty = the node starts one", _optional(_url)
    )
    control: str = setting(
        "", "folder of the sockets to its connector (kv_connector_extra_config.control); empty = the node makes one"
    )
    events: str = setting(
        "",
        "ZeroMQ endpoint of its KV events, with vllm.url: what its prefix cache holds is then told to routers, and not "
        "sent to it",
    )
    arguments: str = setting("", "further arguments of the `vllm serve` that the node starts, as in a shell")
    start_s: float = setting(900.0, "longest that vLLM may take to load the model", Between(1, 86400))
    stall_s: float = setting(
        0.075,
        "how much a decode step may be held up by layers of a joining request that are still on their way",
        Between(0, 60),
    )
    layer_wait_s: float = setting(
        2.0, "a joining request whose next layer is later than this fails, and the batch goes on", Between(0.01, 600)
    )


@dataclass(frozen=True, slots=True)
class Config:
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    log: LogConfig = field(default_factory=LogConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    node: NodeConfig = field(default_factory=NodeConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)


SECRET_KEYS = frozenset({"cluster.secret", "router.api_keys"})
"""Values of these never appear in a message."""

# Short flag names; the long form `--section-field` works for every key.
FLAG_ALIASES: Mapping[str, str] = {
    "--kv-bind": "transport.bind",
    "--kv-advertise": "transport.advertise",
    "--engine": "engine.kind",
    "--model": "engine.model",
    "--dtype": "engine.dtype",
    "--profile": "engine.profile",
    "--time-scale": "engine.time_scale",
    "--bytes-scale": "engine.bytes_scale",
    "--region": "node.region",
    "--name": "node.name",
    "--advertise": "node.advertise",
    "--routers": "node.routers",
    "--bind": "node.bind",
    "--codec": "transport.codec",
    "--lanes": "transport.lanes",
    "--secret-file": "cluster.secret_file",
    "--log-level": "log.level",
    "--log-format": "log.format",
}
RARE_FLAGS = frozenset({"--profile", "--time-scale", "--bytes-scale"})
"""Short names that only --help-all lists."""
ROUTER_FLAG_ALIASES: Mapping[str, str] = {
    **{flag: key for flag, key in FLAG_ALIASES.items() if key.split(".")[0] in ("cluster", "log")},
    "--name": "router.name",
    "--bind": "router.bind",
    "--model": "router.model_path",
    "--threshold": "router.offload_threshold_tokens",
    "--api-keys-file": "router.api_keys_file",
}

T = TypeVar("T")


def keys() -> dict[str, dataclasses.Field[Any]]:
    """Every `section.field` and its dataclass field, in order."""
    return {
        f"{section.name}.{f.name}": f
        for section in dataclasses.fields(Config)
        for f in dataclasses.fields(typing.get_type_hints(Config)[section.name])
    }


def field_type(key: str) -> Any:
    section, name = key.split(".")
    return typing.get_type_hints(typing.get_type_hints(Config)[section])[name]


def env_name(key: str) -> str:
    return "PRFAAS_" + key.replace(".", "_").upper()


def load(
    file: Mapping[str, Any], env: Mapping[str, str], flags: Mapping[str, str], file_name: str = "config file"
) -> Config:
    """Merge and check. `file`: parsed TOML; `env`: the environment; `flags`: `section.field` → text.

    Raises ConfigError with every problem at once: key, where it came from, the value given, what it must be.
    """
    problems: list[str] = []
    known = keys()
    given: dict[str, tuple[Any, str]] = {}
    for section, values in file.items():
        if not isinstance(values, Mapping):
            problems.append(f"{file_name}: {section!r} must be a [section]{_did_you_mean(section, _sections())}")
            continue
        for name, value in values.items():
            key = f"{section}.{name}"
            if key in known:
                given[key] = (value, file_name)
            else:
                problems.append(f"{file_name}: unknown key {key!r}{_did_you_mean(key, known)}")
    by_env = {env_name(key): key for key in known}
    for variable, text in env.items():
        if variable in by_env:
            given[by_env[variable]] = (text, f"environment {variable}")
        elif variable.startswith("PRFAAS_"):
            problems.append(f"environment: unknown variable {variable}{_did_you_mean(variable, by_env)}")
    for key, text in flags.items():
        given[key] = (text, "flag --" + key.replace(".", "-").replace("_", "-"))
    sections: dict[str, dict[str, Any]] = {name: {} for name in _sections()}
    for key, (value, origin) in given.items():
        section, name = key.split(".")
        try:
            sections[section][name] = _checked(key, value, known[key])
        except ValueError as error:
            shown = "<hidden>" if key in SECRET_KEYS else repr(value)
            problems.append(f"{key} = {shown} ({origin}): {error}")
    problems += _tls_problem(sections["tls"])
    problems += _ucx_problem(sections["transport"], sections["tls"])
    if problems:
        raise ConfigError(problems)
    hints = typing.get_type_hints(Config)
    return Config(**{name: hints[name](**values) for name, values in sections.items()})


def _sections() -> list[str]:
    return [f.name for f in dataclasses.fields(Config)]


def _did_you_mean(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _checked(key: str, value: Any, spec: dataclasses.Field[Any]) -> Any:
    converted = _convert(field_type(key), value)
    check = spec.metadata.get("check")
    if check is not None and (problem := check(converted)):
        raise ValueError(problem)
    return converted


def _convert(kind: Any, value: Any) -> Any:
    origin = typing.get_origin(kind)
    if origin is Literal:
        allowed = typing.get_args(kind)
        if value not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return value
    if origin in (Union, types.UnionType):
        return _convert(next(a for a in typing.get_args(kind) if a is not type(None)), value)
    if origin is tuple:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            raise ValueError("must be a list of strings (comma-separated in the environment and in flags)")
        return tuple(value)
    if kind is str:
        if not isinstance(value, str):
            raise ValueError("must be a string")
        return value
    return _number(kind, value)


SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _number(kind: Any, value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([-+]?[0-9._eE+-]+?)\s*(?:([KMGT])(?:i?B)?)?\s*", value)
        try:
            number = float(match[1]) * SIZE_UNITS[match[2] or ""] if match else None
        except ValueError:
            number = None
        if number is None:
            raise ValueError("must be a number (sizes may end in K, M, G)" if kind is int else "must be a number")
        value = number
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("must be a number")
    if kind is int:
        if value != int(value):
            raise ValueError("must be a whole number")
        return int(value)
    return float(value)
