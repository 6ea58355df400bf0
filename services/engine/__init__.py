"""Engines: what computes. The services know `api.Engine` and nothing else."""
