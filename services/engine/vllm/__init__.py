"""What runs inside vLLM: our KV connector. It copies KV between vLLM's paged cache and memory that it shares with our
node; the node (services/vllm) has the transport."""
