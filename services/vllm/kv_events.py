"""vLLM's KV events, over ZeroMQ, into the mirror."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from prfaas.common import log
from prfaas.common.errors import ConfigError
from prfaas.services.vllm.prefix_mirror import PrefixMirror, VllmEvents

SEQUENCE_BYTES = 8
MAX_QUEUED = 100_000
"""Batches that ZeroMQ keeps for us; more are dropped, which the numbers tell."""

_log = log.get_logger("vllm")


class KvEvents:
    """`start`, then `close`. What is lost on the way empties the mirror: the sequence numbers tell."""

    def __init__(self, endpoint: str, mirror: PrefixMirror) -> None:
        """Raises ConfigError."""
        try:
            import zmq
            import zmq.asyncio
        except ImportError as error:
            raise ConfigError(
                ["vllm.events needs pyzmq, which comes with vLLM: start the node in its environment"]
            ) from error
        self._mirror = mirror
        self._decoder = msgspec.msgpack.Decoder(VllmEvents)
        self._next: int | None = None
        self._context = zmq.asyncio.Context()
        self._socket: Any = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, MAX_QUEUED)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.shut()
            raise ConfigError([f"vllm.events = {endpoint}: {error}"]) from error
        self._reading = asyncio.create_task(self._read())

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.wait([self._reading])
        self.shut()

    def shut(self) -> None:
        self._socket.close()
        self._context.term()

    async def _read(self) -> None:
        while True:
            parts = await self._socket.recv_multipart()
            try:
                self._take(int.from_bytes(parts[-2], "big"), parts[-1])
            except (IndexError, ValueError, msgspec.DecodeError) as error:
                _log.warning("KV events of vLLM are not understood", error=str(error))
                self._mirror.reset()

    def _take(self, sequence: int, payload: bytes) -> None:
        if self._next is not None and sequence != self._next:
            _log.warning("KV events of vLLM were lost", expected=self._next, got=sequence)
            self._mirror.reset()
        self._next = sequence + 1
        self._mirror.apply(self._decoder.decode(payload))
