"""The domain, pure: no asyncio, sockets, clocks or torch."""
