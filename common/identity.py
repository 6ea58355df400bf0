"""Who a certificate says its holder is: a node's name and the roles it may have, as URIs among the certificate's names.

    prfaas://node/<name>?role=<prefill|decode|router>      one URI a role

Pure text; certificates are read where TLS is (transport/tls.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

ROLES = ("prefill", "decode", "router")
KV_ROLES = frozenset({"prefill", "decode"})
"""Who may be at the ends of a KV session."""
NAME_PATTERN = r"[A-Za-z0-9._-]{1,128}"
_URI = re.compile(rf"prfaas://node/({NAME_PATTERN})\?role=({'|'.join(ROLES)})")


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """`name` is empty when a certificate of our CA names no node: such a holder is nobody here."""

    name: str
    roles: frozenset[str]

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(sorted(self.roles))})" if self.name else "no node of this cluster"

    def problem(self, *, name: str | None = None, roles: Iterable[str] = ROLES) -> str | None:
        """Why the holder is not `name` in one of `roles`; None: it is. `name` None: any."""
        wanted = sorted(roles)
        if not self.name:
            return "its certificate names no node of this cluster (prfaas certs init makes ones that do)"
        if name is not None and self.name != name:
            return f"its certificate is {self.name}'s, not {name}'s"
        if not self.roles.intersection(wanted):
            allowed = ", ".join(sorted(self.roles))
            return f"its certificate allows {self.name} the role {allowed}, not {' or '.join(wanted)}"
        return None


NOBODY = PeerIdentity("", frozenset())


def identity_uri(name: str, role: str) -> str:
    return f"prfaas://node/{name}?role={role}"


def read_identity(uris: Iterable[str]) -> PeerIdentity:
    """Of a certificate's URIs, foreign ones among them. NOBODY when there is none of ours, or they name two nodes."""
    found = [match.groups() for uri in uris if (match := _URI.fullmatch(uri))]
    names = {name for name, _ in found}
    return PeerIdentity(names.pop(), frozenset(role for _, role in found)) if len(names) == 1 else NOBODY
