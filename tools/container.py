"""Build the image of the Dockerfile and try it: `make docker`.

    python tools/container.py                                          # builds graft:check, serves the demo base, asks it
    python tools/container.py --tag me/graft:cuda --build-arg TORCH=cu130
    python tools/container.py --only-try me/graft:cpu

Where no Docker daemon answers it says so, and ends with status 1: nothing was built.
"""

from __future__ import annotations

import argparse
import http.client
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
READY_SECONDS = 300


def without_docker() -> str:
    """Why no image can be built here; empty where one can."""
    try:
        found = subprocess.run(["docker", "info"], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return "there is no `docker` here"
    except subprocess.TimeoutExpired:
        return "`docker info` did not answer within a minute"
    return "" if found.returncode == 0 else "no Docker daemon answers here"


def docker(*words: str, quiet: bool = True) -> str:
    """The output of a docker command. Raises CalledProcessError."""
    said = subprocess.run(["docker", *words], check=True, text=True, stdout=subprocess.PIPE if quiet else None)
    return (said.stdout or "").strip()


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """The status and the JSON of an answer; status 0 while nothing listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        given = (None, {}) if body is None else (json.dumps(body), {"Content-Type": "application/json"})
        connection.request("GET" if body is None else "POST", path, *given)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    except (OSError, http.client.HTTPException):
        return 0, None
    finally:
        connection.close()


def try_image(tag: str) -> list[str]:
    """Serve the demo base from an image and ask it; returns what was found. Raises AssertionError, CalledProcessError."""
    container = docker("run", "--detach", "--publish", "127.0.0.1::8000", tag)
    try:
        port = int(docker("port", container, "8000/tcp").splitlines()[0].rpartition(":")[2])
        end = time.monotonic() + READY_SECONDS
        while ask(port, "/readyz")[0] != 200:
            assert docker("inspect", "--format", "{{.State.Running}}", container) == "true", docker("logs", container)
            assert time.monotonic() < end, f"not ready within {READY_SECONDS} s"
            time.sleep(0.5)
        status, said = ask(port, "/v1/completions", {"model": "demo", "prompt": "Hello", "max_tokens": 4})
        assert status == 200, said
        user = docker("exec", container, "id", "-u")
        assert user != "0", "the server runs as root"
        docker("stop", "--time", "40", container)
        code = docker("inspect", "--format", "{{.State.ExitCode}}", container)
        assert code == "0", f"status {code} after SIGTERM"
    finally:
        docker("rm", "--force", container)
    help_text = docker("run", "--rm", tag, "train", "--help")
    assert "graft train" in help_text, help_text
    return [f"answers    {said['choices'][0]['text']!r}", f"user       {user}", "stops      with status 0 on SIGTERM"]


def main(words: Sequence[str] | None = None) -> int:
    """Build and try, or say why not; returns the exit status."""
    parser = argparse.ArgumentParser(description="Build the image of the Dockerfile and try it.")
    parser.add_argument("--tag", default="graft:check")
    parser.add_argument(
        "--build-arg", action="append", default=[], metavar="NAME=VALUE", help="TORCH=cu130, EXTRAS=..."
    )
    parser.add_argument("--only-try", metavar="TAG", help="try an image that is there")
    given = parser.parse_args(words)
    why_not = without_docker()
    if why_not:
        print(f"no image was built or tried: {why_not}", file=sys.stderr)
        return 1
    tag = given.only_try or given.tag
    if not given.only_try:
        arguments = [word for one in given.build_arg for word in ("--build-arg", one)]
        docker("build", "--tag", tag, *arguments, str(ROOT), quiet=False)
    print(f"image      {tag}: {int(docker('image', 'inspect', '--format', '{{.Size}}', tag)) / 1e9:.2f} GB")
    for line in try_image(tag):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
