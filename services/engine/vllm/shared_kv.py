"""The memory that our node and this vLLM worker share, and the transfers in it, as the worker's model thread sees them.

The node says over the control socket which transfers there are and which layers have arrived; a thread of `worker_link`
takes that in. Here the model thread waits for layers and finds a transfer's memory as tensors.
"""

from __future__ import annotations

import mmap
import threading
import time
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
from prfaas.common.kv_layout import KvLayout, TokenRange
from prfaas.services.engine.vllm.staging import StagingPlan

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
    "uint8": torch.uint8,
}
LAYOUT_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class TransferMemory:
    """One transfer. Whoever copies holds `lock` and has looked at `closed`: once it is set, the memory is another's."""

    def __init__(
        self, transfer_id: str, kind: Literal["save", "load"], plan: StagingPlan, memory: torch.Tensor, offset: int
    ) -> None:
        self.transfer_id = transfer_id
        self.kind = kind
        self.plan = plan
        self._memory = memory
        self._offset = offset
        self.lock = threading.Condition()
        self.closed = False
        self.failed = ""
        self._arrived: set[int] = set()
        self.saved: dict[tuple[int, int], int] = {}
        """(layer, tensor) → tokens up to here are out."""

    def tensor(self, layer: int, tensor: int) -> torch.Tensor:
        """Keys, values, latents: [heads, tokens of the extent, *dims]; a state: its dims."""
        spec = self.plan.layout.layers[layer].tensors[tensor]
        extent = self.plan.extents[layer][tensor]
        shape = spec.dims if spec.kind.is_state else (extent.rows, extent.tokens, *spec.dims)
        dtype = TORCH_DTYPES[spec.dtype]
        begin = self._offset + self.plan.offset(layer, tensor)
        return self._memory[begin : begin + prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def arrived(self, layers: list[int]) -> None:
        with self.lock:
            self._arrived.update(layers)
            self.lock.notify_all()

    def fail(self, reason: str) -> None:
        with self.lock:
            self.failed = self.failed or reason
            self.lock.notify_all()

    def close(self) -> None:
        """When this returns the memory is not touched any more."""
        with self.lock:
            self.closed = True
            self.failed = self.failed or "the transfer was closed"
            self.lock.notify_all()

    def wait(self, layer: int, until_s: float) -> str:
        """ "": the layer is here. Else why it isn't, at the latest at `until_s` of the monotonic clock. With `lock`."""
        while layer not in self._arrived:
            if self.failed:
                return self.failed
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                return f"layer {layer} was not there in time"
            self.lock.wait(left_s)
        return self.failed if self.closed else ""


@dataclass(slots=True)
class SharedKv:
    """A node's memory and transfers. On the link's thread, but for `find`."""

    layout: KvLayout
    memory: torch.Tensor
    """Bytes of all of it."""
    layer_wait_s: float
    _transfers: dict[str, TransferMemory] = field(default_factory=dict)

    def begin(
        self, transfer_id: str, kind: Literal["save", "load"], tokens: TokenRange, offset_bytes: int
    ) -> TransferMemory:
        """Raises ValueError when it doesn't lie within the memory."""
        plan = StagingPlan(self.layout, tokens)
        if offset_bytes < 0 or offset_bytes % 8 or offset_bytes + plan.total_bytes > self.memory.numel():
            raise ValueError(f"a transfer of {plan.total_bytes} bytes at {offset_bytes} of {self.memory.numel()}")
        transfer = TransferMemory(transfer_id, kind, plan, self.memory, offset_bytes)
        self._transfers[transfer_id] = transfer
        return transfer

    def find(self, transfer_id: str) -> TransferMemory | None:
        return self._transfers.get(transfer_id)

    def close(self, transfer_id: str) -> None:
        if (transfer := self._transfers.pop(transfer_id, None)) is not None:
            transfer.close()

    def close_all(self) -> None:
        for transfer_id in list(self._transfers):
            self.close(transfer_id)


def map_memory(descriptor: int, size_bytes: int) -> torch.Tensor:
    """All of the shared memory, as bytes. It is unmapped with the last tensor of it."""
    return torch.frombuffer(mmap.mmap(descriptor, size_bytes), dtype=torch.uint8)
