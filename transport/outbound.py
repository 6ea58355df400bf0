"""What leaves next on a session's lanes: whose turn it is, and in which codec; encoders work a little ahead."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import NamedTuple

from prfaas.common.errors import EngineError
from prfaas.common.kv_layout import TensorKind
from prfaas.common.log import get_logger
from prfaas.transport.channel import Outgoing
from prfaas.transport.codecs.api import ChunkForm, Codec, form_of
from prfaas.transport.codecs.choice import RAW_NAME, CodecSpeeds
from prfaas.transport.fairness import DeficitRoundRobin
from prfaas.transport.frames import RAW, checksum, encode_chunk_header
from prfaas.transport.sending import TransferSender
from prfaas.transport.transfer import Cut

log = get_logger("transport")


class Outbound:
    """`codec_of(kind)`: None = raw. `wake`: something may be ready for the lanes now."""

    def __init__(
        self,
        threads: int,
        executor: Executor,
        codec_of: Callable[[TensorKind], Codec | None],
        speeds: CodecSpeeds,
        wake: Callable[[], None],
    ) -> None:
        self._turns: DeficitRoundRobin[TransferSender] = DeficitRoundRobin()
        self._threads = threads
        self._executor = executor
        self._codec_of = codec_of
        self._speeds = speeds
        self._wake = wake
        self._loop = asyncio.get_running_loop()
        self._encoding = 0
        self._ready: deque[Outgoing] = deque()

    def activate(self, sender: TransferSender) -> None:
        """It may have a chunk to send."""
        self._turns.activate(sender)

    @property
    def encoding_limits(self) -> bool:
        """Lanes wait for the encoders."""
        return self._encoding > 0 and not self._ready

    def remove(self, sender: TransferSender) -> None:
        """No chunk of it leaves any more. Idempotent."""
        self._turns.remove(sender)
        if self._ready:
            self._ready = deque(outgoing for outgoing in self._ready if outgoing.sender is not sender)

    def next(self, lanes: int) -> Outgoing | None:
        """The chunk that leaves now, if one is ready. `lanes`: how many take chunks."""
        if self._ready:
            outgoing = self._ready.popleft()
            self.encode_ahead(lanes)
            return outgoing
        while self._encoding < self._threads + lanes:
            found = self._next_cut()
            if found is None:
                return None
            if (made := self._raw_or_encode(*found)) is not None:
                return made
        return None

    def encode_ahead(self, lanes: int) -> None:
        """Keep the encoder threads busy, but not further ahead than the lanes can take: late chunks go first."""
        while (self._encoding or self._ready) and self._encoding + len(self._ready) < self._threads + lanes:
            found = self._next_cut()
            if found is None:
                return
            outgoing = self._raw_or_encode(*found)
            if outgoing is not None:
                self._ready.append(outgoing)

    def _next_cut(self) -> tuple[TransferSender, Cut] | None:
        sender = self._turns.next()
        if sender is None:
            return None
        cut = sender.next_cut()
        assert cut is not None
        return sender, cut

    def _raw_or_encode(self, sender: TransferSender, cut: Cut) -> Outgoing | None:
        tensor = sender.layout.layers[cut.layer].tensors[cut.tensor]
        codec = self._codec_of(tensor.kind)
        if codec is not None:
            self._encode(codec, sender, cut, form_of(tensor))
            return None
        size = len(cut.data)
        self._speeds.encoded(RAW_NAME, tensor.kind, size, size, 0.0)
        check = checksum(cut.data, sender.number, cut.sequence)
        header = encode_chunk_header(sender.number, cut.sequence, cut.place, size, size, RAW, check, cut.copy)
        return Outgoing(sender, cut, header, cut.data)

    def _encode(self, codec: Codec, sender: TransferSender, cut: Cut, form: ChunkForm) -> None:
        self._encoding += 1
        sender.begin_read()
        job = self._loop.run_in_executor(self._executor, encode_chunk, codec, cut, form, sender.number)
        job.add_done_callback(partial(self._encode_done, sender, cut, codec, form.kind))

    def _encode_done(
        self, sender: TransferSender, cut: Cut, codec: Codec, kind: TensorKind, job: asyncio.Future[Encoded]
    ) -> None:
        self._encoding -= 1
        sender.end_read()
        if job.cancelled() or (error := job.exception()) is not None:
            if not job.cancelled():
                log.error("encoding failed", error=str(error))
            sender.fail(EngineError("the codec failed; the log of the sending side says more"))
        elif sender.active:
            header, payload, encode_s = job.result()
            self._speeds.encoded(codec.name, kind, len(cut.data), len(payload), encode_s)
            self._ready.append(Outgoing(sender, cut, header, payload))
        self._wake()


class Encoded(NamedTuple):
    header: bytes
    payload: memoryview
    encode_s: float
    """On the clock: where others want the processor too, a codec is that much slower."""


def encode_chunk(codec: Codec, cut: Cut, form: ChunkForm, transfer: int) -> Encoded:
    """In a thread. A chunk that doesn't shrink goes raw, from the engine's memory."""
    started_s = time.perf_counter()
    wire = codec.encode(cut.data, form)
    encode_s = time.perf_counter() - started_s
    payload = cut.data if wire is None else memoryview(wire)
    number = RAW if wire is None else codec.number
    lossless = wire is None or codec.lossless
    check = checksum(cut.data if lossless else payload, transfer, cut.sequence)
    header = encode_chunk_header(
        transfer, cut.sequence, cut.place, len(cut.data), len(payload), number, check, cut.copy
    )
    return Encoded(header, payload, encode_s)
