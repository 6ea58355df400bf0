"""Ours: two KvEndpoints and one transfer, checksum on, as the services use them."""

from __future__ import annotations

import secrets
from typing import Any

from child import HOST, InMemory, Loop, Memory, Options, main
from prfaas.common import log
from prfaas.common.config import TransportConfig
from prfaas.common.kv_layout import KvLayout, LayerLayout, TensorKind, TensorLayout, TokenRange
from prfaas.transport.api import KvAddress, KvPiece, TransferSpec
from prfaas.transport.endpoint import KvEndpoint

ROW_BYTES = 16 << 20
HEAD_DIM = 128
ROW_TOKENS = ROW_BYTES // (2 * HEAD_DIM)
FINGERPRINT = "0" * 32


class PrfaasKv(InMemory):
    def __init__(self, options: Options, memory: Memory) -> None:
        super().__init__(options, memory)
        log.configure("error", "console")
        # A layer is the whole memory, keys and then values; the memory is passed over as often as there are layers.
        self._heads = memory.nbytes // (2 * ROW_BYTES)
        kinds = (TensorKind.KEY, TensorKind.VALUE)
        layer = LayerLayout(tuple(TensorLayout(kind, "bfloat16", self._heads, (HEAD_DIM,)) for kind in kinds))
        self._layout = KvLayout((layer,) * (options["bytes"] // memory.nbytes))
        self._loop = Loop()
        self._loop.run(self._start())

    async def _start(self) -> None:
        config = TransportConfig(
            lanes=self.options["lanes"],
            chunk_bytes=self.options["chunk_bytes"],
            codec="raw",
            congestion_control=self.options["congestion_control"],
        )
        self._kv = KvEndpoint(
            config,
            node=self.options["role"],
            layout=self._layout,
            model_fingerprint=FINGERPRINT,
            secret=b"benchmark",
        )
        await self._kv.start()

    def row(self, _layer: int, tensor: int, row: int) -> memoryview:
        start = (tensor * self._heads + row) * ROW_BYTES
        return self.memory.view[start : start + ROW_BYTES]

    def listen(self) -> dict[str, Any]:
        return self._loop.run(self._listen())

    async def _listen(self) -> dict[str, Any]:
        tokens = TokenRange(0, ROW_TOKENS)
        name = secrets.token_hex(16)
        spec = TransferSpec(name, "benchmark", tokens, ROW_TOKENS + 1, 1, FINGERPRINT, self._layout.layout_hash)
        ticket, receiver = self._kv.receiver(spec)
        receiver.bind(lambda _spec: self, lambda _layer: None, lambda _error: None)
        self._receiver = receiver
        return {"port": self._kv.addresses[0].port, "ticket": ticket}

    def connect(self, receiver: dict[str, Any]) -> None:
        self._loop.run(self._connect(receiver))

    async def _connect(self, receiver: dict[str, Any]) -> None:
        self._sender = self._kv.sender(receiver["ticket"], "receiver", [KvAddress(HOST, receiver["port"])])
        await self._sender.open()

    def send(self) -> None:
        self._loop.run(self._send())

    async def _send(self) -> None:
        for layer in range(len(self._layout.layers)):
            rows = ((tensor, row) for tensor in range(2) for row in range(self._heads))
            self._sender.put([KvPiece(layer, tensor, row, 0, self.row(layer, tensor, row)) for tensor, row in rows])
        self._sender.finish({})
        await self._sender.done()


if __name__ == "__main__":
    main(PrfaasKv)
