"""Continuous batching: requests, scheduler, KV cache, adapters in memory, sampling."""
