"""Our node beside a vLLM: it has the transport, vLLM computes. What runs inside vLLM is services/engine/vllm."""
