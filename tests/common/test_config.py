"""Settings: precedence, and that all mistakes are told at once with key, origin and value."""

import pytest
from prfaas.common import config
from prfaas.common.errors import ConfigError


def test_defaults_are_valid():
    """Nothing given is a working single-machine configuration: every default passes its own check."""
    loaded = config.load({}, {}, {})
    for key, spec in config.keys().items():
        section, name = key.split(".")
        value = getattr(getattr(loaded, section), name)
        check = spec.metadata["check"]
        assert check is None or check(value) is None, key


def test_flags_win_over_environment_over_file():
    """The order of precedence is flag, environment, file, default."""
    file = {"transport": {"lanes": 2, "codec": "lz4", "chunk_bytes": 65536}}
    loaded = config.load(
        file, {"PRFAAS_TRANSPORT_LANES": "3", "PRFAAS_TRANSPORT_CODEC": "zstd"}, {"transport.lanes": "5"}
    )
    assert (loaded.transport.lanes, loaded.transport.codec, loaded.transport.chunk_bytes) == (5, "zstd", 65536)


def test_all_mistakes_are_reported_at_once():
    """Unknown keys (with a suggestion), wrong types and values out of bounds come together, each with where it came
    from and what was given."""
    with pytest.raises(ConfigError) as caught:
        config.load(
            {"node": {"bnd": "x"}, "transport": {"lanes": "many"}, "nodes": 3},
            {"PRFAAS_ROUTER_BIND": "nowhere", "PRFAAS_TYPO": "1"},
            {"engine.kind": "gpu"},
            "cluster.toml",
        )
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 6
    for expected in (
        "cluster.toml: unknown key 'node.bnd'; did you mean 'node.bind'?",
        "transport.lanes = 'many' (cluster.toml): must be a number",
        "'nodes' must be a [section]; did you mean 'node'?",
        "router.bind = 'nowhere' (environment PRFAAS_ROUTER_BIND): must look like host:port",
        "unknown variable PRFAAS_TYPO",
        "engine.kind = 'gpu' (flag --engine-kind): must be one of transformers, vllm, emulated",
    ):
        assert expected in text


def test_secrets_are_not_shown():
    """A wrong value of a secret key is not repeated in the message."""
    with pytest.raises(ConfigError) as caught:
        config.load({"cluster": {"secret": 12345}}, {}, {})
    assert "12345" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"), [("2G", 2 << 30), ("64MiB", 64 << 20), ("1048576", 1 << 20), ("1e9", 10**9)]
)
def test_sizes(text, value):
    """Sizes may be written with binary units."""
    assert config.load({}, {}, {"engine.arena_bytes": text}).engine.arena_bytes == value


@pytest.mark.parametrize("text", ["", "1.5", "nan", "inf", "1e999", "1X", "e", "true"])
def test_bad_numbers(text):
    """What is no whole number is refused."""
    with pytest.raises(ConfigError):
        config.load({}, {}, {"transport.lanes": text})


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("a:1", ("a", 1)),
        ("[::1]:80", ("::1", 80)),
        ("10.0.0.1:0", ("10.0.0.1", 0)),
        ("[fe80::1%eth0]:9000", ("fe80::1%eth0", 9000)),
        ("[fe80::1%wg-prfaas.12]:9000", ("fe80::1%wg-prfaas.12", 9000)),
        ("[fe80::1%2]:9000", ("fe80::1%2", 9000)),
        ("[::ffff:10.0.0.1]:1", ("::ffff:10.0.0.1", 1)),
    ],
)
def test_addresses(text, address):
    """host:port, IPv4 and bracketed IPv6, with the interface of a link-local address where it has one."""
    assert config.parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "a", ":1", "a:b", "::1:80", "a:70000", "a b:1", "a:1\u0662", "[]:1", "[a]:1", "[10.0.0.1]:1", "[fe80::1%]:1",
        "[fe80::1%a%b]:1", "[fe80::1%a b]:1", "[fe80::1%eth0]", "fe80::1%eth0:1", "[::1:1", "[[::1]]:1",
    ],
)  # fmt: skip
def test_bad_addresses(text):
    """What is ambiguous or out of range is refused."""
    with pytest.raises(ValueError, match="host:port"):
        config.parse_address(text)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("::1%lo", True),
        ("127.0.0.2", True),
        ("localhost", True),
        ("fe80::1%lo", False),
        ("fe80::1%eth0", False),
        ("::", False),
        ("example", False),
    ],
)
def test_loopback(host, loopback):
    """What only this machine can reach; a link-local address is no such, whatever its interface is called."""
    assert config.is_loopback(host) is loopback
