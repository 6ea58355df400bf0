"""The machine between two networks: what one sends to the other goes over an emulated line. Linux, CAP_NET_ADMIN.

    first network                      here                              second network
    hosts ── eth0 ─ rule: from eth0 ▶ tun ▶ line ▶ tun ─ main table ─ eth1 ── hosts

Each side's hosts have this machine's address there, the *gateway*, as their default route; it is added here, since
Docker gives a network's gateway address to nobody. Packets from a side are routed into a TUN device; what comes out of
the other one is routed as usual, to a connected network. Nothing else is forwarded: a packet for any other place
enters the line and is dropped at its end.
"""

from __future__ import annotations

import ipaddress
import os
import pwd
import select
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prfaas.common.errors import SetupError
from prfaas.services.wan import control
from prfaas.services.wan.settings import Change, Settings, State, changed
from prfaas.services.wan.tun import Relay, open_tun, set_offload

if TYPE_CHECKING:
    from pyroute2 import IPRoute

FIRST_TABLE = 8801
RULE_PRIORITY = 1000
LAST_METRIC = 1 << 30
QUEUE_PACKETS = 10000


@dataclass(frozen=True, slots=True)
class Side:
    """One network."""

    gateway: ipaddress.IPv4Interface
    device: str
    """The network device that leads there."""
    mtu_bytes: int


def run(
    gateways: tuple[ipaddress.IPv4Interface, ipaddress.IPv4Interface],
    settings: Settings,
    *,
    path: Path,
    user: str,
    stop: int,
) -> None:
    """Until the descriptor `stop` is readable. `user`: what the process becomes once the line is up; empty: it stays.

    Raises SetupError, OSError. Once the process has ended, nothing crosses: rules and the gateways' addresses stay,
    which a next one takes over, and lead nowhere.
    """
    _check_forwarding()
    devices = _join(gateways)
    listener = control.listen(path)
    if user:
        _become(user)
    line = RoutedLine((devices[0], devices[1]), settings)
    line.run(listener, stop)


def _join(gateways: Sequence[ipaddress.IPv4Interface]) -> list[int]:
    """The TUN devices, with the routes into them."""
    try:
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError
    except ImportError as error:
        raise SetupError("routing needs pyroute2; the mend: pip install 'prfaas[wan]'") from error
    try:
        with IPRoute() as ip:
            sides = [_side(ip, gateway) for gateway in gateways]
            devices = [_device(ip, i, side) for i, side in enumerate(sides)]
            for side in sides:  # last: until then nobody has a way
                _add_gateway(ip, side)
        return devices
    except (PermissionError, NetlinkError) as error:
        raise SetupError(f"can't route here ({error}); this needs CAP_NET_ADMIN in the network's namespace") from error


class RoutedLine:
    def __init__(self, devices: tuple[int, int], settings: Settings) -> None:
        self._devices = devices
        self._settings = settings
        self._relay = Relay(devices, settings.conditions())
        self._offload()

    def apply(self, change: Change) -> State:
        self._settings = changed(self._settings, change)
        self._relay.conditions = self._settings.conditions()
        self._offload()
        there, back = self._relay.counters()
        return State(settings=self._settings, there=there, back=back)

    def run(self, listener: socket.socket, stop: int) -> None:
        poll = select.epoll()
        for descriptor in (listener.fileno(), stop):
            poll.register(descriptor, select.EPOLLIN)

        def woken() -> bool:
            ready = [descriptor for descriptor, _ in poll.poll(0)]
            if listener.fileno() in ready:
                control.answer(listener, self.apply)
            return stop not in ready

        self._relay.run(poll.fileno(), woken)

    def _offload(self) -> None:
        """Loss is of single packets."""
        for device in self._devices:
            set_offload(device, self._settings.loss_percent == 0)


def _check_forwarding() -> None:
    if Path("/proc/sys/net/ipv4/ip_forward").read_text(encoding="ascii").strip() != "1":
        raise SetupError("this machine forwards nothing; the mend: sysctl -w net.ipv4.ip_forward=1")
    if not Path("/dev/net/tun").exists():
        raise SetupError("no /dev/net/tun; the mend: modprobe tun, and in a container: devices: [/dev/net/tun]")


def _side(ip: IPRoute, gateway: ipaddress.IPv4Interface) -> Side:
    """By the device of this machine that is in the gateway's network."""
    for found in ip.get_addr(family=socket.AF_INET):
        address = ipaddress.IPv4Address(found.get_attr("IFA_ADDRESS"))
        if address not in gateway.network:
            continue
        (link,) = ip.get_links(found["index"])
        return Side(gateway, link.get_attr("IFLA_IFNAME"), link.get_attr("IFLA_MTU"))
    raise SetupError(f"no device of this machine is in the network {gateway.network} of the gateway {gateway.ip}")


def _add_gateway(ip: IPRoute, side: Side) -> None:
    (index,) = ip.link_lookup(ifname=side.device)
    address = str(side.gateway.ip)
    if all(there.get_attr("IFA_ADDRESS") != address for there in ip.get_addr(family=socket.AF_INET, index=index)):
        ip.addr("add", index=index, address=address, prefixlen=32)


def _device(ip: IPRoute, i: int, side: Side) -> int:
    """A TUN device into which everything is routed that comes from the side."""
    name = f"wan{i}"
    device = open_tun(name)
    index = ip.link_lookup(ifname=name)[0]
    ip.link("set", index=index, mtu=side.mtu_bytes, txqlen=QUEUE_PACKETS, state="up")
    everywhere: dict[str, Any] = {"family": socket.AF_INET, "dst": "0.0.0.0/0", "table": FIRST_TABLE + i}
    ip.route("replace", oif=index, **everywhere)
    # When this process is gone, so is its device, and the machine must not forward past the line.
    ip.route("replace", type="blackhole", priority=LAST_METRIC, **everywhere)
    for rule in ip.get_rules(family=socket.AF_INET):
        if rule.get_attr("FRA_TABLE") == FIRST_TABLE + i:  # of a process that was here before
            ip.rule("del", table=FIRST_TABLE + i, iifname=rule.get_attr("FRA_IIFNAME"), priority=RULE_PRIORITY + i)
    ip.rule("add", table=FIRST_TABLE + i, iifname=side.device, priority=RULE_PRIORITY + i)
    return device


def _become(user: str) -> None:
    """For good: with the user id the capabilities go."""
    try:
        who = pwd.getpwnam(user)
    except KeyError:
        raise SetupError(f"there is no user {user} on this machine") from None
    os.setgroups([])
    os.setresgid(who.pw_gid, who.pw_gid, who.pw_gid)
    os.setresuid(who.pw_uid, who.pw_uid, who.pw_uid)
