"""vLLM's endpoints for adapters, which it has when it was started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.

    GET  /v1/models                {"data": [{"id": "formal", "root": "/adapters/formal@3-1f0c...", "parent": "the base"}]}
    POST /v1/load_lora_adapter     {"lora_name", "lora_path", "load_inplace"}     200 as text; 400 a name that is loaded, 404 no
                                   adapter at the path, 400 or (later releases) 500 one that cannot be loaded
    POST /v1/unload_lora_adapter   {"lora_name"}                                  200 as text; 404 a name that is not loaded

`load_inplace` is vLLM's since 0.15, earlier ones ignore it. Errors are OpenAI's objects. Read from vLLM's documentation
(features/lora) and its sources (`entrypoints/openai/models/serving.py`) of 2025 and 2026.
"""

from __future__ import annotations

import http.client
import json
import re
from typing import Any
from urllib.parse import urlsplit

from graftlm.errors import GraftError
from graftlm.jsonfile import parse_json

LIST_SECONDS = 10.0
LOAD_SECONDS = 300.0
"""vLLM answers a load when the adapter is in memory, between two steps of its engine."""
_MOST_BYTES = 8 << 20
_NOT_THERE = (502, 503, 504)
_CACHES_PREFIXES = re.compile(r'^vllm:cache_config_info\{[^\n]*enable_prefix_caching="True"', re.MULTILINE)


class VllmUnreachable(GraftError):
    """Nothing answers at the address, or not as vLLM does; this may pass."""


class VllmRefused(GraftError):
    """The server answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class VllmServer:
    """A running vLLM at an address such as http://127.0.0.1:8000; its API key is sent if there is one."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url
        place = urlsplit(url)
        self._kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._prefix = place.hostname or "", place.port, place.path
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def adapters(self) -> dict[str, str]:
        """The loaded adapters' names and folders, as the server has them. Raises VllmUnreachable, VllmRefused."""
        try:
            cards = parse_json(self._ask("GET", "/v1/models", LIST_SECONDS))["data"]
            return {str(card["id"]): str(card["root"]) for card in cards if card.get("parent") is not None}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise VllmUnreachable(f"{self.url}/v1/models does not answer as vLLM does") from None

    def load(self, name: str, folder: str, *, in_place: bool = False) -> None:
        """Load an adapter; with `in_place`, instead of the one that has the name. Raises VllmUnreachable, VllmRefused."""
        body: dict[str, Any] = {"lora_name": name, "lora_path": folder}
        if in_place:
            body["load_inplace"] = True
        self._ask("POST", "/v1/load_lora_adapter", LOAD_SECONDS, body)

    def unload(self, name: str) -> None:
        """Forget a name. Raises VllmUnreachable, VllmRefused."""
        self._ask("POST", "/v1/unload_lora_adapter", LOAD_SECONDS, {"lora_name": name})

    def caches_prefixes(self) -> bool:
        """Whether prefix caching is on, from the metrics; False where these do not say."""
        try:
            return (
                _CACHES_PREFIXES.search(self._ask("GET", "/metrics", LIST_SECONDS).decode(errors="replace")) is not None
            )
        except VllmRefused:
            return False

    def _ask(self, method: str, path: str, seconds: float, body: dict[str, Any] | None = None) -> bytes:
        """The answer's bytes, directly: a proxy of the environment is for other machines than the servers of a cluster."""
        connection = self._kind(self._host, self._port, timeout=seconds)
        try:
            headers = {**self._headers, "Content-Type": "application/json"} if body is not None else self._headers
            connection.request(
                method, self._prefix + path, None if body is None else json.dumps(body).encode(), headers
            )
            response = connection.getresponse()
            data = response.read(_MOST_BYTES)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise VllmUnreachable(f"{self.url} does not answer: {reason}") from None
        finally:
            connection.close()
        if response.status in _NOT_THERE:
            raise VllmUnreachable(f"{self.url} is not ready: status {response.status}")
        if response.status != 200:
            raise VllmRefused(response.status, _message(data))
        return data


def _message(data: bytes) -> str:
    """What an error says: OpenAI's object, the flat one of earlier releases, FastAPI's, or the text."""
    try:
        found = parse_json(data)
        found = found.get("error", found)
        text = found if isinstance(found, str) else found.get("message") or found.get("detail")
        return str(text or data.decode(errors="replace"))[:1000]
    except (ValueError, AttributeError):
        return data.decode(errors="replace")[:1000]
