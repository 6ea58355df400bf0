"""The live client: sends a workload to an OpenAI-compatible server and notes what became of each request.

    schedule (pure) ─▶ runner ─▶ exchange: one request over HTTP ─▶ record ─▶ records, progress
                         │            └─▶ timelines: what a PrfaaS router says of it, soon after
                         └─▶ watch: how late the client itself was

`endpoint.py`, `stream.py` and `verdict.py` are pure.
"""
