"""The scripts for machines without containers: installed into a scratch root, units and shell checked, and a rollout
over a real sshd between network namespaces while requests run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from prfaas.common import config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker" / "bare-metal"
SCRIPTS = [*FOLDER.glob("*.sh"), ROOT / "tests" / "compose" / "engine.sh"]
ROUTER_PORT, PORTS = 8000, {"d1": 8001, "d2": 8002, "p1": 8003}
NEAR, FAR = "10.91.7.1", "10.91.7.2"
WAIT_S = 60


pytestmark = pytest.mark.deploy


def program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(f"/usr/sbin/{name}")


def run(script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    command = [str(FOLDER / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings}, timeout=300)


@pytest.mark.skipif(program("shellcheck") is None, reason="no shellcheck here: the scripts were NOT checked")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    done = subprocess.run([str(program("shellcheck")), str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_example_is_a_configuration() -> None:
    """All its settings exist and are in range; what is commented out, too."""
    text = (FOLDER / "cluster.example.toml").read_text()
    for each in (text, re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE)):
        loaded = config.load(tomllib.loads(each), {}, {})
        assert loaded.node.drain_s == 120.0


# -- install and uninstall --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an operator has: a configuration, a secret, certificates."""
    folder = tmp_path_factory.mktemp("given")
    shutil.copy(FOLDER / "cluster.example.toml", folder / "cluster.toml")
    (folder / "secret").write_text("a secret of the tests\n")
    for name in ("ca.pem", "d1.pem", "d1.key"):
        (folder / name).write_text(f"{name} of the tests\n")
    return folder


def install(root: Path, given: Path, *more: str, role: str = "decode") -> subprocess.CompletedProcess[str]:
    flags = ["--root", str(root), "--role", role, "--config", str(given / "cluster.toml"), "--extras", ""]
    return run("install.sh", *flags, "--python", sys.executable, *more)


def files(root: Path) -> set[str]:
    """Without the package's own."""
    found = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return {f"/{path}" for path in found if not str(path).startswith("opt/prfaas/venv")}


def test_install_again_change_and_uninstall(given: Path, tmp_path: Path) -> None:
    """The second time there is nothing to do; a changed file is replaced and the old one kept; units pass systemd's own
    check and are confined; uninstalling leaves the configuration, and with --purge nothing."""
    root = tmp_path / "root"
    more = ["--name", "d1", "--region", "home", "--certs", str(given), "--secret", str(given / "secret")]
    more += ["--advertise", "https://d1:8001"]
    done = install(root, given, *more)
    assert done.returncode == 0, done.stderr
    expected = {"/etc/prfaas/cluster.toml", "/etc/prfaas/secret", "/etc/prfaas/decode.env"}
    expected |= {f"/etc/prfaas/tls/{name}" for name in ("ca.pem", "d1.pem", "d1.key")}
    expected |= {"/etc/systemd/system/prfaas-decode.service", "/etc/sysctl.d/90-prfaas.conf"}
    assert files(root) == expected | {"/opt/prfaas/installed-from"}
    for name in ("secret", "tls/d1.key", "cluster.toml", "decode.env"):
        assert (root / "etc/prfaas" / name).stat().st_mode & 0o777 == 0o640
    env = dict(line.split("=", 1) for line in (root / "etc/prfaas/decode.env").read_text().splitlines()[1:])
    loaded = config.load(tomllib.loads((root / "etc/prfaas/cluster.toml").read_text()), env, {})
    assert (loaded.node.name, loaded.node.region, loaded.tls.key_file) == ("d1", "home", "/etc/prfaas/tls/d1.key")
    prfaas = subprocess.run([root / "opt/prfaas/venv/bin/prfaas", "--help"], capture_output=True, text=True)
    assert "prfaas COMMAND" in prfaas.stdout

    again = install(root, given, *more)
    assert again.stdout == "== nothing to do: prfaas-decode is as it should be\n"
    check_unit(root, "decode")

    (given / "secret").write_text("another\n")
    changed = install(root, given, *more)
    assert changed.stdout == "== write /etc/prfaas/secret\n== installed; not started\n"
    assert (root / "etc/prfaas/secret.old").read_text() == "a secret of the tests\n"
    assert install(root, given, role="router").returncode == 0
    check_unit(root, "router")

    assert run("uninstall.sh", "--root", str(root)).returncode == 0
    assert all(name.startswith("/etc/prfaas/") for name in files(root))
    assert run("uninstall.sh", "--root", str(root), "--purge").returncode == 0
    assert files(root) == set()


def check_unit(root: Path, role: str) -> None:
    analyze = program("systemd-analyze")
    if analyze is None:
        pytest.fail("no systemd-analyze here: apt-get install systemd")
    unit = root / "etc/systemd/system" / f"prfaas-{role}.service"
    # The program is where the unit says, below the scratch root only.
    checked = root.parent / unit.name
    checked.write_text(unit.read_text().replace("/opt/prfaas/", f"{root}/opt/prfaas/"))
    verify = [analyze, "verify", "--recursive-errors=no", "--man=no", str(checked)]
    done = subprocess.run(verify, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    security = [analyze, "security", "--offline=true", "--threshold=30", str(checked)]
    done = subprocess.run(security, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "--role is missing"),
        (["--role", "both"], "must be router, prefill or decode, not both"),
        (["--role", "decode", "--config", "/nowhere"], "--config /nowhere is not there"),
        (["--role", "decode", "--config"], "--config needs a value"),
        (["--rolle", "decode"], "unknown option --rolle"),
        (["--role", "decode", "--config", "{given}/cluster.toml", "--root", "{given}/r"], "no cluster secret yet"),
        (
            ["--role", "decode", "--config", "{given}/cluster.toml", "--secret", "{given}/secret", "--certs", "{given}",
             "--name", "d7"],
            "has no d7.pem; prfaas certs init",
        ),
    ],
)  # fmt: skip
def test_mistakes_of_install(given: Path, arguments: list[str], complaint: str) -> None:
    """One line, status 2, and nothing is changed."""
    done = run("install.sh", *(argument.format(given=given) for argument in arguments))
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


# -- rollout ----------------------------------------------------------------------------------------------------------


def why_no_rollout() -> str | None:
    if os.geteuid() != 0:
        return "not root"
    missing = [name for name in ("ip", "sshd", "ssh", "ssh-keygen") if program(name) is None]
    if missing:
        return f"no {', '.join(missing)} here"
    known = any(line.startswith("sshd:") for line in Path("/etc/passwd").read_text().splitlines())
    return None if known else "no user sshd here"


WHY_NOT = why_no_rollout()
needs_sshd = pytest.mark.skipif(WHY_NOT is not None, reason=f"{WHY_NOT}: a rollout over ssh was NOT tried")

RESTART = """#!/bin/sh
# What systemctl restart does: end it, wait, start it again.
set -e
cd {folder}
if [ -f $1.pid ]; then kill -TERM "$(cat $1.pid)" 2>/dev/null || true; while kill -0 "$(cat $1.pid)" 2>/dev/null; do
  sleep 0.05; done; fi
[ ! -e $1.broken ] || exit 1
setsid sh -c 'echo $$ > '$1.pid'; exec '"$(cat $1.command)" >>$1.log 2>&1 </dev/null &
"""


class Region:
    """A network namespace with an sshd, a router, two decode nodes and a prefill node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.near, self.far = f"prfaas-{os.getpid()}-a", f"prfaas-{os.getpid()}-b"
        self.url = f"http://{FAR}:{ROUTER_PORT}"
        self.ssh = ""

    def start(self) -> None:
        for name in (self.near, self.far):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "veth-a", "netns", self.near, "type", "veth", "peer", "name", "veth-b", "netns", self.far)
        for name, device, address in ((self.near, "veth-a", NEAR), (self.far, "veth-b", FAR)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
        self._sshd()
        restart = self.folder / "restart"
        restart.write_text(RESTART.format(folder=self.folder))
        restart.chmod(0o755)
        (self.folder / "secret").write_text("a secret of the tests")
        secret = f"--secret-file {self.folder / 'secret'}"
        prfaas = f"{sys.executable} -m prfaas.services"
        self._add("router", f"{prfaas} router --bind {FAR}:{ROUTER_PORT} --model bytes {secret}")
        for name, port in PORTS.items():
            role = "prefill" if name == "p1" else "decode"
            flags = f"--name {name} --region home --bind {FAR}:{port} --kv-bind {FAR}:0 --routers {self.url} {secret}"
            engine = "--engine emulated --engine-decode-step-s 0.02 --engine-arena-bytes 64M --node-heartbeat-s 0.25"
            self._add(name, f"{prfaas} {role} {flags} {engine}")

    def _add(self, name: str, command: str) -> None:
        (self.folder / f"{name}.command").write_text(command)
        self.inside(str(self.folder / "restart"), name)

    def _sshd(self) -> None:
        for name in ("host", "client"):
            key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
            subprocess.run(key, check=True)
        Path("/run/sshd").mkdir(exist_ok=True)
        settings = [f"ListenAddress {FAR}:2222", f"HostKey {self.folder / 'host'}", "UsePAM no", "StrictModes no"]
        settings += [f"AuthorizedKeysFile {self.folder / 'client.pub'}", "PermitRootLogin yes", "PidFile none"]
        (self.folder / "sshd_config").write_text("\n".join(settings) + "\n")
        found = program("sshd")
        assert found is not None
        self.inside(found, "-f", str(self.folder / "sshd_config"), "-E", str(self.folder / "sshd.log"))
        options = ["BatchMode=yes", "StrictHostKeyChecking=no", "LogLevel=ERROR", "ConnectTimeout=5"]
        options += [f"UserKnownHostsFile={self.folder / 'known'}"]
        words = [word for option in options for word in ("-o", option)]
        self.ssh = " ".join(["ssh", "-F", "none", "-p", "2222", "-i", str(self.folder / "client"), *words])

    def inside(self, *command: str) -> str:
        done = subprocess.run(["ip", "netns", "exec", self.far, *command], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def nodes(self) -> dict[str, int]:
        """Process ids."""
        return {name: int((self.folder / f"{name}.pid").read_text()) for name in PORTS}

    def rollout(self, *arguments: str, hosts: str | None = None) -> subprocess.CompletedProcess[str]:
        lines = [f"root@{FAR} {role} http://{FAR}:{PORTS[name]}/readyz --name {name}" for name, role in
                 (("d1", "decode"), ("p1", "prefill"))]  # fmt: skip
        (self.folder / "hosts").write_text(hosts or "# the region\n\n" + "\n".join(lines) + "\n")
        (self.folder / "cluster.toml").write_text("[node]\ndrain_s = 20.0\n")
        command = ["ip", "netns", "exec", self.near, str(FOLDER / "rollout.sh"), "--hosts", str(self.folder / "hosts")]
        command += ["--config", str(self.folder / "cluster.toml"), "--ready-s", "30", *arguments]
        environment = {**os.environ, "PRFAAS_SSH": self.ssh}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=WAIT_S * 2)

    def stop(self) -> None:
        for name in (self.near, self.far):
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            subprocess.run(["ip", "netns", "delete", name], check=False)


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


@pytest.fixture
def region(tmp_path: Path) -> Iterator[Region]:
    made = Region(tmp_path)
    try:
        made.start()
        yield made
    finally:
        made.stop()


CLIENT = """
import asyncio, json, sys
import aiohttp
from prfaas.services.engine.emulated.output import OutputTokens

async def main(url, until):
    answers = 0
    body = {"model": "emulated", "max_tokens": 40, "temperature": 0, "stream": True}
    async with aiohttp.ClientSession() as session:
        async def client(i):
            nonlocal answers
            while not until.exists():
                prompt = [65 + i] * (20 + answers % 50)
                text = ""
                async with session.post(url + "/v1/completions", json=body | {"prompt": prompt}) as response:
                    assert response.status == 200, await response.text()
                    async for line in response.content:
                        if line.startswith(b"data: {"):
                            text += json.loads(line[6:])["choices"][0]["text"]
                output = OutputTokens(prompt, None)
                assert text == bytes(output.token(k) for k in range(40)).decode(), text
                answers += 1
        await asyncio.gather(*(client(i) for i in range(8)))
    print(answers)

import pathlib
asyncio.run(main(sys.argv[1], pathlib.Path(sys.argv[2])))
"""


async def until_usable(region: Region) -> None:
    """Two decode nodes and a prefill node."""
    code = f"import urllib.request as u; print(u.urlopen('{region.url}/metrics', timeout=2).read().decode())"
    wanted = ('role="decode",state="usable"} 2.0', 'role="prefill",state="usable"} 1.0')
    async with asyncio.timeout(WAIT_S):
        while True:
            with contextlib.suppress(AssertionError):
                if all(each in region.inside(sys.executable, "-c", code) for each in wanted):
                    return
            await asyncio.sleep(0.2)  # a poll: the state can only be asked for


INSTALL = ("--install", "sh -c 'test -f docker/bare-metal/install.sh && echo installed' ;:")


@needs_sshd
@pytest.mark.timeout(240)
async def test_a_rollout_replaces_one_node_after_the_other_and_loses_nothing(region: Region, tmp_path: Path) -> None:
    """Each drains and is ready again before the next; a dry run touches nothing; the first failure stops it and says
    what was done; a host that can't be reached stops it before anything."""
    await until_usable(region)
    restart = ("--restart", f"{tmp_path}/restart-by-role ")
    script = tmp_path / "restart-by-role"
    script.write_text(f'#!/bin/sh\ncase $1 in decode) n=d1;; prefill) n=p1;; esac\necho $n >> {tmp_path}/order\n'
                      f'exec {tmp_path}/restart $n\n')  # fmt: skip
    script.chmod(0o755)
    before = region.nodes()

    dry = region.rollout(*restart, *INSTALL, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert f"== 2 of 2: root@{FAR} prefill" in dry.stdout
    assert region.nodes() == before

    over = tmp_path / "over"
    client = [sys.executable, "-c", CLIENT, region.url, str(over)]
    with subprocess.Popen(["ip", "netns", "exec", region.far, *client], stdout=subprocess.PIPE, text=True) as asking:
        done = await asyncio.to_thread(region.rollout, *restart, *INSTALL)
        over.touch()
        answers = asking.communicate(timeout=WAIT_S)[0]
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"== done: root@{FAR}/decode root@{FAR}/prefill"
    assert asking.returncode == 0
    assert int(answers) >= 8
    after = region.nodes()
    assert {name for name in before if before[name] != after[name]} == {"d1", "p1"}
    assert (tmp_path / "order").read_text().split() == ["d1", "p1"]

    (tmp_path / "p1.broken").touch()
    failed = await asyncio.to_thread(region.rollout, *restart, *INSTALL)
    assert failed.returncode == 1
    assert f"root@{FAR} prefill failed; done before it: root@{FAR}/decode" in failed.stderr

    at = region.nodes()
    hosts = f"root@{FAR} decode http://{FAR}:8001/readyz\nroot@10.91.7.9 decode http://10.91.7.9:8001/readyz\n"
    gone = await asyncio.to_thread(region.rollout, *restart, *INSTALL, hosts=hosts)
    assert gone.returncode == 1
    assert "root@10.91.7.9 does not answer over ssh; nothing was changed" in gone.stderr
    assert region.nodes() == at


@pytest.mark.parametrize(
    ("hosts", "complaint"),
    [
        ("", "names no host"),
        ("a both http://x/\n", "line 1: the role must be router, prefill or decode, not 'both'"),
        ("# a\na decode\n", "line 2: the URL must look like http://127.0.0.1:8001/readyz, not ''"),
    ],
)
def test_mistakes_of_rollout(given: Path, tmp_path: Path, hosts: str, complaint: str) -> None:
    """Found before any host is called."""
    (tmp_path / "hosts").write_text(hosts)
    done = run("rollout.sh", "--hosts", str(tmp_path / "hosts"), "--config", str(given / "cluster.toml"))
    assert done.returncode == 2
    assert complaint in done.stderr
    assert json.dumps(done.stderr).count("\\n") == 1
