"""The one interface between the services and whatever computes.

An engine serves both roles: `prefill` computes the first n−1 prompt tokens and hands each layer's KV to the senders,
`decode` takes KV from the receivers (or computes it itself), recomputes the last prompt token and samples every output
token. How the bytes reach the transport is the engine's affair; a node never touches KV.

All instants are `time.monotonic()` seconds of the node's machine.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from prfaas.common.kv_layout import KvLayout
from prfaas.common.perfmodel.profiles import NodeProfile
from prfaas.common.prefixcache.events import Event
from prfaas.services.engine.prefix_store import Hold, PrefixStore
from prfaas.transport.api import KvReceiver, KvSender, TransferReport


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """As in the OpenAI API; temperature 0 = greedy. Seeded draws are keyed by (seed, output position), so a stream
    that is continued on another node draws the same tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 = off."""
    seed: int | None = None
    min_tokens: int = 0
    """End-of-sequence tokens are not sampled before this many output tokens."""
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the router and the other side must know of the loaded model."""

    model: str
    """Name served to clients."""
    model_fingerprint: str
    layout: KvLayout
    max_model_tokens: int
    vocabulary: int
    eos_token_ids: tuple[int, ...]
    arena_bytes: int


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Goes into the heartbeat."""

    queued_requests: int = 0
    queued_tokens: int = 0
    """Prompt tokens waiting for or in prefill."""
    running_requests: int = 0
    context_tokens: int = 0
    """Tokens held for running decodes."""
    free_kv_bytes: int = 0
    max_requests: int = 0
    """An engine with so many takes no more; 0: there is no such bound."""
    decoding_requests: int = 0
    """In the batch now …"""
    waiting_requests: int = 0
    """… and with all their KV, for want of a place in it."""


@dataclass(frozen=True, slots=True)
class PrefillRequest:
    """prompt_token_ids: the whole prompt (n tokens). Sent: the range in each sender's spec. hold: of the first n−1, in
    this engine's `prefixes`; what it holds isn't computed. The engine releases it at the end. tenant: who may share
    what is kept of this prompt."""

    request_id: str
    prompt_token_ids: Sequence[int]
    timeout_s: float | None = None
    tenant: str = ""
    hold: Hold | None = None
    priority: int = 0
    """See `rank_s`."""
    adapter: str = ""
    """Of those in `Forwarding.adapters`; "": the model itself."""


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """output_token_ids: tokens that were delivered already (a continuation): decode goes on behind them.
    max_output_tokens counts them. hold: of the context but its last token, in this engine's `prefixes`; the receivers'
    range begins where it ends, and without receivers only the rest is computed. The engine releases it at the end."""

    request_id: str
    prompt_token_ids: Sequence[int]
    max_output_tokens: int
    sampling: SamplingParams
    output_token_ids: Sequence[int] = ()
    timeout_s: float | None = None
    tenant: str = ""
    hold: Hold | None = None
    priority: int = 0
    """See `rank_s`."""


def rank_s(queued_s: float, priority: int, priority_s: float) -> float:
    """The place of a request in a queue, least first: as if it had come `priority_s` later for each unit of its
    priority (earlier for negative ones). So nobody waits for ever: requests of priority p overtake those of q > p that
    have waited less than (q − p) · priority_s, and no others. What has begun to compute isn't interrupted."""
    return queued_s + priority * priority_s


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"


# -- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """The last event of a prefill that succeeded. `computed_s` has one instant a layer: when the last piece of it that
    the range needs was computed. `queued_s`, `started_s`, `ended_s` and `computed_s` go to the decode node under these
    names in `KvSender.finish`."""

    queued_s: float
    started_s: float
    ended_s: float
    computed_s: list[float]
    reports: list[TransferReport] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """After each step: tokens of the range computed so far."""

    computed_tokens: int


PrefillEvent = PrefillProgress | PrefillDone


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One sampled token; `position` counts output tokens from 0 (delivered ones included)."""

    token_id: int
    position: int
    at_s: float


@dataclass(frozen=True, slots=True)
class DecodeTimeline:
    """Before the first TokenEvent: when each layer arrived (None = not sent) and was first used.

    For a local prefill `arrived_s` is all None, and queued_s / started_s / ended_s tell of it.
    """

    arrived_s: list[float | None]
    used_s: list[float]
    queued_s: float | None = None
    started_s: float | None = None
    ended_s: float | None = None
    kv_unused: str = ""
    """Why the engine has not taken the KV that came, in a word; "": it has, or none came."""


@dataclass(frozen=True, slots=True)
class DecodeDone:
    """The last event. stop_token_id: the end-of-sequence or stop token that ended it, which is not emitted."""

    reason: FinishReason
    output_tokens: int
    stop_token_id: int | None = None


DecodeEvent = DecodeTimeline | TokenEvent | DecodeDone


@dataclass(frozen=True, slots=True)
class ForwardedChunk:
    """A piece of the response as the engine's own server writes it. data: one JSON object, for the client. token_ids:
    of the output in it."""

    data: bytes
    token_ids: list[int]
    at_s: float
    last: bool = False
    """Of a stream: the last but [DONE]. Of a response that isn't streamed: all of it."""


ForwardedEvent = DecodeTimeline | ForwardedChunk


@dataclass(frozen=True, slots=True)
class ForwardRequest:
    """body: the client's, for /v1/chat/completions (kind chat) or /v1/completions. prompt_token_ids: what `prompt` has
    said of it."""

    request_id: str
    kind: Literal["chat", "completion"]
    body: Mapping[str, Any]
    prompt_token_ids: Sequence[int]
    max_output_tokens: int
    timeout_s: float | None = None
    tenant: str = ""
    priority: int = 0


E_co = TypeVar("E_co", covariant=True)


class EventStream(Protocol[E_co]):
    """What `prefill` and `decode` return: an async iterator that must be closed (an async generator is one)."""

    def __aiter__(self) -> AsyncIterator[E_co]: ...

    async def __anext__(self) -> E_co: ...

    async def aclose(self) -> None: ...


class Forwarding(Protocol):
    """Of an engine that has an OpenAI server of its own, which knows more than ours: tools, structured output,
    reasoning, adapters."""

    @property
    def adapters(self) -> Sequence[str]:
        """Names of the model's variants that it serves too."""
        ...

    async def prompt(self, kind: Literal["chat", "completion"], body: Mapping[str, Any]) -> list[int]:
        """The token ids that the engine makes of the body. Raises RequestError, EngineError."""
        ...

    def forward(self, request: ForwardRequest, transfers: Sequence[KvReceiver]) -> EventStream[ForwardedEvent]:
        """As `Engine.decode`; the response comes as the engine writes it."""
        ...


class CacheMirror(Protocol):
    """What is known of a prefix cache that is the engine's own. Nothing in it is pinned."""

    def held_tokens(self, token_ids: Sequence[int], tenant: str) -> int:
        """Of these, from the first on, that the engine would find now."""
        ...

    def drain_events(self) -> list[Event]: ...

    def contents(self) -> list[Event]: ...


class Engine(Protocol):
    """Methods are called on the event loop's thread.

    `prefill` and `decode` raise RequestError at once for what the client has done wrong (token ids outside the
    vocabulary, a context that is too long): then nothing has begun, and the transfers are still the caller's to close.

    Iterators: the request is accepted when `prefill` / `decode` returns, not at the first `anext`; an exception ends
    the iterator (EngineError, TransferError, TimeoutError). Closing the iterator (`aclose`, or cancelling the task that
    awaits it and then closing) cancels the request between layers; when `aclose` returns, its memory is free and its
    transfers are closed. Every iterator must be closed.
    """

    @property
    def info(self) -> EngineInfo:
        """Valid after `start`."""
        ...

    @property
    def failure(self) -> str | None:
        """Why nothing can be computed any more, with the mend, or None. It is final: every request has failed, and
        `prefill` and `decode` raise EngineError with this text. Valid at any time."""
        ...

    @property
    def prefixes(self) -> PrefixStore | None:
        """The KV of prefixes that it keeps; None: none. Valid after `start`; `close` closes it."""
        ...

    @property
    def mirror(self) -> CacheMirror | None:
        """Of an engine with a prefix cache of its own: what it tells of it. Valid after `start`."""
        ...

    @property
    def forwarding(self) -> Forwarding | None:
        """None: clients' bodies are answered from token ids. Valid after `start`."""
        ...

    @property
    def profile(self) -> NodeProfile | None:
        """What routers must expect of this node, in real seconds and bytes; None: it isn't known. It may change while
        the engine measures itself. Valid after `start`."""
        ...

    def on_failure(self, callback: Callable[[], None]) -> None:
        """`callback` is called on the event loop's thread, once, as soon as `failure` is there. One callback; it is
        given before `start`."""
        ...

    async def start(self) -> None:
        """Load the model and touch the arena's memory. Raises ModelRefusedError, ConfigError."""
        ...

    async def close(self) -> None:
        """Cancel what runs and free everything."""
        ...

    def prefill(self, request: PrefillRequest, transfers: Sequence[KvSender]) -> EventStream[PrefillEvent]:
        """Compute the KV of the transfers' token range and send it layer by layer.

        `KvSender.open` is called about one round trip before the request's turn; on "no room" the request steps aside
        and asks again while others go on. A range that is empty ends at once.
        """
        ...

    def decode(self, request: DecodeRequest, transfers: Sequence[KvReceiver]) -> EventStream[DecodeEvent]:
        """Generate. `bind` of each receiver is called before this returns. No receivers: prefill locally, in steps of a
        few tokens, so that running streams are not held up."""
        ...

    def load(self) -> EngineLoad: ...
