"""What an emulated engine puts into the prefix pool: KV is a function of the tokens, so it is made once more."""

from __future__ import annotations

from collections.abc import Sequence

from prfaas.services.engine.emulated.content import KvContent
from prfaas.services.engine.emulated.machine import Machine
from prfaas.services.engine.prefix_store import Writing


async def keep(machine: Machine, token_ids: Sequence[int], tenant: str) -> None:
    """The complete blocks of these tokens, and the state behind the last one, as far as there is room."""
    store = machine.prefixes
    if store is None or len(token_ids) < store.block_tokens:
        return
    writing = store.reserve(token_ids, tenant)
    if writing is None:
        return
    try:
        content = await machine.content(list(token_ids[: writing.end]))
        size = store.layout.bytes_per_token * (writing.end - writing.start) + store.layout.fixed_bytes
        await machine.run(lambda: _fill(writing, content, machine), size)
        writing.commit()
    finally:
        writing.abandon()


def _fill(writing: Writing, content: KvContent, machine: Machine) -> None:
    for layer, tensors in enumerate(machine.info.layout.layers):
        for tensor, spec in enumerate(tensors.tensors):
            for row in range(spec.heads):
                if not spec.kind.is_state:
                    data = memoryview(bytearray((writing.end - writing.start) * spec.row_bytes_per_token))
                    content.fill(data, layer, tensor, row, writing.start, writing.end)
                    writing.write(layer, tensor, row, writing.start, data)
                    continue
                for point in writing.snapshot_points:
                    data = memoryview(bytearray(spec.fixed_bytes))
                    content.fill(data, layer, tensor, row, 0, point)
                    writing.write_state(point, layer, tensor, row, data)
    for point in writing.snapshot_points:
        writing.complete_state(point)
