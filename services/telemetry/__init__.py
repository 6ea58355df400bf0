"""Traces: which spans a request has (`spans`, pure), and how they get to a collector (`tracing`)."""
