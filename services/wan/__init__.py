"""Emulated WANs, for demos, tests and benchmarks: `proxy` needs no privileges and shows rate and delay; `route` carries
IP packets between two networks, so that lanes see round-trip time, loss and a full queue as they are."""
