"""Helpers for tests, benchmarks, examples and the authors of other vLLM plugins; no command imports them.

server starts a `vllm serve`, tiny_models writes small random checkpoints, make_scores makes up scores files.
"""
