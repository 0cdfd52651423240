"""The Dockerfile: what can be said of it without building, and the image itself where a Docker daemon runs."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from graftlm.cli import app
from graftlm.serving.http.app import router
from tools import container
from tools.container import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
STEPS = [
    (match[1], re.sub(r"\\\n\s*", "", match[2]).strip())
    for match in re.finditer(r"^([A-Z]+) ((?:.*\\\n)*.*)$", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE), re.MULTILINE)
]  # fmt: skip


def steps(kind: str) -> list[str]:
    return [text for found, text in STEPS if found == kind]


def _sent(path: str) -> bool:
    """Whether .dockerignore lets a path into the build, as Docker reads it: the last pattern that matches decides."""
    parts = Path(path).parts
    whole = ["/".join(parts[: i + 1]) for i in range(len(parts))]  # a folder's pattern holds for what is in it
    sent = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!")
        anywhere = pattern.startswith("**/")
        if line and not line.startswith("#"):
            tried = parts if anywhere else [one for one in whole if one.count("/") == pattern.count("/")]
            if any(fnmatch.fnmatchcase(one, pattern.removeprefix("**/")) for one in tried):
                sent = line.startswith("!")
    return sent


def test_what_is_copied_is_there_and_sent_and_all_that_is_built_of_is_copied() -> None:
    copied = [word for step in steps("COPY") if "--from" not in step for word in shlex.split(step)[:-1]]
    for name in copied:
        assert (ROOT / name).exists(), name
        assert _sent(name), f"{name} is kept out by .dockerignore"
    needed = {"pyproject.toml", "setup.py", "constraints.txt", PROJECT["project"]["readme"], "graftlm"}
    assert {*needed, *PROJECT["project"]["license-files"]} == set(copied)
    assert _sent("graftlm/kernels/native/gemm.c")
    kept_out = (
        "tests",
        "docs/serving.md",
        ".git/config",
        "graftlm/__pycache__/x.pyc",
        "graftlm/kernels/native/_kernels.so",
    )
    assert [name for name in kept_out if _sent(name)] == []


def test_its_commands_are_shell_and_each_stage_names_the_arguments_that_it_reads() -> None:
    for step in steps("RUN"):
        subprocess.run(["sh", "-n", "-c", step], check=True)
    for stage in DOCKERFILE.split("\nFROM ")[1:]:
        named = set(re.findall(r"^ARG (\w+)", stage, flags=re.MULTILINE))
        read = {name for name in ("TORCH", "EXTRAS") if re.search(rf"\${{?{name}\b", stage)}
        assert named == read


def test_its_python_is_one_that_the_package_takes_and_the_tests_use() -> None:
    (given,) = [step for step in steps("ARG") if step.startswith("PYTHON=")]
    version = given.removeprefix("PYTHON=")
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(Version(f"{version}.0"))
    assert version == PROJECT["tool"]["basedpyright"]["pythonVersion"]
    images = steps("FROM")
    assert [image.split()[0] for image in images] == ["python:${PYTHON}-slim"] * 2
    assert images[0].endswith(" AS build")
    assert "--from=build" in "".join(steps("COPY"))


def _install() -> str:
    (install,) = [step for step in steps("RUN") if "--requirement requirements.txt" in step]
    return install


def test_the_dependencies_are_those_of_pyproject_and_pinned(tmp_path: Path) -> None:
    install = _install()
    script = install[install.index('-c "') + 4 : install.index('" > requirements.txt')].replace("${EXTRAS}", "serve")
    listed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    given = listed.stdout.split("\n")[:-1]
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    assert given == [*PROJECT["build-system"]["requires"], *project["dependencies"], *extras["serve"]]
    assert "--constraint pins.txt" in install
    assert "grep -v '^triton==' constraints.txt > pins.txt" in install
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
    )
    lower = {name.lower().replace("_", "-") for name in pins}
    for requirement in project["dependencies"] + extras["serve"]:
        assert Requirement(requirement).name.lower().replace("_", "-") in lower, f"{requirement} is not pinned"
    assert {"serve"} == {step.removeprefix("EXTRAS=") for step in steps("ARG") if step.startswith("EXTRAS=")}


def test_the_kernels_are_compiled_in_the_first_stage_and_must_be_there() -> None:
    first = DOCKERFILE.split("\nFROM ")[1]
    assert "install --yes --no-install-recommends gcc" in first
    (build,) = [step for step in steps("RUN") if "--no-build-isolation" in step]
    check = re.search(r'python -c "([^"]+)"', build)
    assert check is not None
    subprocess.run([sys.executable, "-c", check[1]], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


def test_it_serves_by_default_without_root_and_is_asked_for_its_health() -> None:
    import typer.main

    (command,), (entry,), (user,) = (steps(kind) for kind in ("CMD", "ENTRYPOINT", "USER"))
    assert json.loads(entry) == ["graft"]
    words = json.loads(command)
    group = typer.main.get_command(app)
    chosen = group.get_command(None, words[0])  # type: ignore[attr-defined, arg-type]
    values = chosen.make_context(words[0], words[1:]).params
    assert (values["model"], values["host"]) == ("demo", "0.0.0.0")
    assert user.isdecimal()
    assert user != "0"
    (health,) = steps("HEALTHCHECK")
    (path,) = set(re.findall(r"127\.0\.0\.1:8000(/\w+)", health))
    assert path in {route.path for route in router.routes}  # type: ignore[attr-defined]
    assert steps("EXPOSE") == ["8000"]


def test_where_there_is_no_docker_make_says_so_and_builds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert container.main([]) == 1
    assert capsys.readouterr().err == "no image was built or tried: there is no `docker` here\n"
    daemonless = tmp_path / "docker"
    daemonless.write_text("#!/bin/sh\nexit 1\n")
    daemonless.chmod(0o755)
    assert container.main(["--build-arg", "TORCH=cu130"]) == 1
    assert capsys.readouterr().err == "no image was built or tried: no Docker daemon answers here\n"
    assert "$(PYTHON) tools/container.py" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.prove
def test_the_image_is_built_serves_and_stops() -> None:
    why_not = container.without_docker()
    if why_not:
        pytest.skip(why_not)
    assert container.main([]) == 0
