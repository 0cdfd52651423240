"""The same adapters on vLLM: exported and served by its command, and a running server kept in step with the store.

export.py    the folders that vLLM reads, and the command
client.py    vLLM's endpoints for adapters
follower.py  what the store has, compared with what the server has, and brought over
"""

from graftlm.serving.vllm.export import export_for_vllm
from graftlm.serving.vllm.follower import VllmFollower

__all__ = ["VllmFollower", "export_for_vllm"]
