"""Heartbeats to one router, without a node around them."""

from __future__ import annotations

import asyncio
from typing import Any

from prfaas.common.config import ClusterConfig
from prfaas.common.metrics import Metrics
from prfaas.services.messages import HeartbeatAnswer
from prfaas.services.node.heartbeat import RouterLink
from prfaas.services.web import Signer, client_session

WAIT_S = 10.0


async def test_a_cancel_that_comes_together_with_a_call_to_beat_is_not_lost() -> None:
    """A pool's news ask for a heartbeat at once; a node that leaves in that moment ends all the same."""
    beats = asyncio.Event()

    def make(link: RouterLink) -> Any:
        beats.set()
        return {}

    def never(*_: Any) -> None:
        raise AssertionError("nobody answers")

    answered: list[HeartbeatAnswer] = []
    async with client_session() as session, await asyncio.start_server(lambda *_: None, "127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        listener.close()
        link = RouterLink(
            url,
            session,
            Signer.of(b"a secret of the tests", ClusterConfig()),
            Metrics().node,
            3600.0,
            3600.0,
            make,
            lambda link, answer: answered.append(answer),
            never,
            never,
        )
        async with asyncio.timeout(WAIT_S):
            task = asyncio.create_task(link.run())
            await beats.wait()
            while link._trouble == "":
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            link.beat_now()
            task.cancel()
            await asyncio.wait([task])
    assert task.cancelled()
    assert not answered
