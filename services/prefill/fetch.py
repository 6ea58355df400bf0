"""The prefix that another node has more of: asked of it, and taken into the own pool, before prefill."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import suppress
from typing import NamedTuple

from prfaas.common import log
from prfaas.common.errors import PrfaasError, TransferError
from prfaas.common.kv_layout import TokenRange
from prfaas.common.prefixcache.hashes import BlockHasher
from prfaas.services.engine.prefix_store import Hold, PrefixStore
from prfaas.services.messages import PrefillCall
from prfaas.transport.api import KvAddress, TransferSpec
from prfaas.transport.endpoint import KvEndpoint

FETCH_TIMEOUT_S = 10.0
"""Where the router says nothing else."""

_log = log.get_logger("prefill")


class Fetched(NamedTuple):
    """tokens: that came. failed: why nothing did, in one word."""

    tokens: int = 0
    wire_bytes: int = 0
    failed: str = ""


NOTHING_FETCHED = Fetched()


async def fetch_prefix(
    endpoint: KvEndpoint, store: PrefixStore, hold: Hold, call: PrefillCall, hasher: BlockHasher, model_fingerprint: str
) -> Fetched:
    """Extends `hold` by what `call.fetch` names, up to whole blocks. Never raises for what goes wrong on the way: the
    hold is then as it was. Cancelled: the transfer has ended when it raises, and the hold is as it was, or longer."""
    fetch = call.fetch
    assert fetch is not None
    start, end = hold.tokens, fetch.tokens - fetch.tokens % hasher.block_tokens
    if end <= start or end >= len(call.prompt_token_ids):
        return NOTHING_FETCHED
    spec = TransferSpec(
        transfer_id=uuid.uuid4().hex,
        request_id=call.request_id,
        tokens=TokenRange(start, end),
        prompt_tokens=end + 1,
        max_output_tokens=0,
        model_fingerprint=model_fingerprint,
        layout_hash=endpoint.layout.layout_hash,
    )
    prefix_hash = hasher.keys(call.prompt_token_ids[:end])[-1]
    addresses = [KvAddress(a.host, a.port, a.rank) for a in fetch.kv_addresses]
    timeout_s = FETCH_TIMEOUT_S if fetch.timeout_s is None else fetch.timeout_s
    if call.timeout_s is not None:
        timeout_s = min(timeout_s, call.timeout_s / 2)  # what is left must do for computing it
    ticket, receiver = endpoint.receiver(spec, fetch.node)
    # It binds the receiver in its first step, before anything can come.
    taking = asyncio.create_task(store.take_in(hold, receiver))
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.sleep(0)
            if taking.done():  # no room, or it came meanwhile: nothing is asked for
                await taking
                return Fetched(hold.tokens - start)
            await endpoint.fetch(ticket, prefix_hash, fetch.node, addresses, timeout_s)
            await taking
    except (PrfaasError, TimeoutError) as error:
        reason = error.reason if isinstance(error, TransferError) else _word(error)
        _log.warning("fetch failed", node=fetch.node, tokens=end - start, reason=reason, error=str(error))
        return Fetched(failed=reason)
    finally:
        taking.cancel()
        with suppress(asyncio.CancelledError, PrfaasError, TimeoutError):
            await taking
        await receiver.aclose()
    return Fetched(hold.tokens - start, receiver.report.wire_bytes)


def _word(error: Exception) -> str:
    return "timeout" if isinstance(error, TimeoutError) else "refused"
