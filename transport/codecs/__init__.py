"""Codecs of chunks, lossless and lossy; pure functions over bytes. `registry.CODECS` lists them."""
