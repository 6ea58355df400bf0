"""Tickets: the decode node's permission for one transfer. Pure: time and the key are arguments.

A ticket is `base64url(claims) . base64url(mac)`. The key is random, made by the process that issues, never shared: the
issuer is the only one that verifies, and a new process refuses the tickets of the old one. The claims are readable by
the prefill node, which makes its half of the transfer from them.

    issued --first OPEN in time--> presented (by one session) --close--> void
       '------ not in time -----> expired
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

import msgspec
from prfaas.common.auth import sign, verify
from prfaas.common.errors import ConfigError, TicketError
from prfaas.common.kv_layout import Shard, TokenRange
from prfaas.transport.api import TransferSpec
from prfaas.transport.frames import MAX_TICKET_CHARS

KEY_BYTES = 32


class Claims(msgspec.Struct, frozen=True, omit_defaults=True):
    """expires_s is of the issuer's monotonic clock and means nothing to anybody else."""

    transfer_id: str
    request_id: str
    token_start: int
    token_end: int
    prompt_tokens: int
    max_output_tokens: int
    model_fingerprint: str
    layout_hash: str
    issuer: str
    expires_s: float
    shard: tuple[int, int, int, int | None] = (0, 1, 0, None)
    sender: str = ""
    """The node that may present it; empty: any of the cluster."""
    epoch: str = ""
    """Which process of the issuer's name it was, as its HELLO says."""

    def spec(self) -> TransferSpec:
        return TransferSpec(
            transfer_id=self.transfer_id,
            request_id=self.request_id,
            tokens=TokenRange(self.token_start, self.token_end),
            prompt_tokens=self.prompt_tokens,
            max_output_tokens=self.max_output_tokens,
            model_fingerprint=self.model_fingerprint,
            layout_hash=self.layout_hash,
            shard=Shard(*self.shard),
        )


def read_claims(ticket: str) -> Claims:
    """The claims, *not verified*: only the issuer can. Raises TicketError when the text is no ticket."""
    return _split(ticket)[0]


def _split(ticket: str) -> tuple[Claims, bytes, bytes]:
    if len(ticket) > MAX_TICKET_CHARS:
        raise TicketError(f"the ticket has {len(ticket)} characters; at most {MAX_TICKET_CHARS} are allowed")
    try:
        claims_text, _, mac_text = ticket.partition(".")
        body = base64.urlsafe_b64decode(claims_text.encode("ascii"))
        mac = base64.urlsafe_b64decode(mac_text.encode("ascii"))
        claims = msgspec.msgpack.decode(body, type=Claims)
        claims.spec()
    except (binascii.Error, UnicodeError, msgspec.DecodeError, RecursionError, ConfigError) as error:
        raise TicketError(f"this is not a ticket: {error}") from None
    return claims, body, mac


@dataclass(slots=True)
class _Issued:
    expires_s: float
    session: str | None = None


class TicketBook:
    """The tickets that one process has issued and not voided."""

    def __init__(self, key: bytes, issuer: str, epoch: str = "") -> None:
        self._key = key
        self._issuer = issuer
        self._epoch = epoch
        self._issued: dict[str, _Issued] = {}

    def issue(self, spec: TransferSpec, expires_s: float, sender: str = "") -> str:
        shard = spec.shard
        body = msgspec.msgpack.encode(
            Claims(
                transfer_id=spec.transfer_id,
                request_id=spec.request_id,
                token_start=spec.tokens.start,
                token_end=spec.tokens.end,
                prompt_tokens=spec.prompt_tokens,
                max_output_tokens=spec.max_output_tokens,
                model_fingerprint=spec.model_fingerprint,
                layout_hash=spec.layout_hash,
                issuer=self._issuer,
                expires_s=expires_s,
                shard=(shard.index, shard.count, shard.head_start, shard.head_end),
                sender=sender,
                epoch=self._epoch,
            )
        )
        self._issued[spec.transfer_id] = _Issued(expires_s)
        mac = sign(self._key, body)
        return f"{base64.urlsafe_b64encode(body).decode()}.{base64.urlsafe_b64encode(mac).decode()}"

    def present(self, ticket: str, session: str, now_s: float, node: str = "") -> TransferSpec:
        """What the ticket permits. The first session that presents it in time owns it; later OPENs of that session
        are good, expired or not. Raises TicketError with what is wrong."""
        claims, body, mac = _split(ticket)
        if not verify(self._key, mac, body):
            raise TicketError("the ticket was not issued by this process (it may have restarted), or was altered")
        if claims.sender not in ("", node):
            raise TicketError(f"the ticket was issued for {claims.sender}, not for {node or 'this node'}")
        issued = self._issued.get(claims.transfer_id)
        if issued is None:
            raise TicketError("the ticket is void: its transfer has finished or was cancelled")
        if issued.session is None:
            if now_s > issued.expires_s:
                raise TicketError(f"the ticket expired {now_s - issued.expires_s:.1f} s ago")
            issued.session = session
        elif issued.session != session:
            raise TicketError("the ticket was presented by another session before")
        return claims.spec()

    def presented(self, transfer_id: str) -> bool:
        issued = self._issued.get(transfer_id)
        return issued is not None and issued.session is not None

    def void(self, transfer_id: str) -> None:
        """After FINISH or CANCEL no OPEN is good any more. Idempotent."""
        self._issued.pop(transfer_id, None)
