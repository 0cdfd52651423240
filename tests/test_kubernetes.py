"""examples/kubernetes: what a cluster would only say later. Every `graft` command is one, probes ask endpoints that exist,
and pods have longer to end than their servers take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

from graftlm.cli import app
from graftlm.config import ServeConfig
from graftlm.errors import ConfigError
from graftlm.serving.http.api_keys import read_api_keys
from graftlm.serving.http.app import router
from graftlm.serving.vllm import follower
from graftlm.serving.vllm.export import _command
from graftlm.yamlfile import read_yaml

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "examples" / "kubernetes"
PAGE = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
CLOSING_SECONDS = 5
"""What a server takes at most to close its connections after draining (`timeout_graceful_shutdown`)."""


def objects(name: str) -> list[dict[str, Any]]:
    found = read_yaml(PLACE / f"{name}.yaml", ConfigError)
    return found["items"] if found["kind"] == "List" else [found]


NAMES = sorted(path.stem for path in PLACE.glob("*.yaml"))
ALL = [(name, one) for name in NAMES for one in objects(name)]
PODS = [
    (f"{name}/{one['metadata'].get('name', 'job')}", one["spec"]["template"]["spec"])
    for name, one in ALL
    if "template" in one.get("spec", {})
]


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command of a container's arguments and its options, as graft's own command line reads them."""
    command: Any = typer.main.get_command(app)
    name, rest = "", words
    while hasattr(command, "get_command"):
        name = f"{name} {rest[0]}".strip()
        command, rest = command.get_command(None, rest[0]), rest[1:]
        assert command is not None, name
    values = command.make_context(name, list(rest)).params
    return name, {key: value for key, value in values.items() if value not in (None, [], ())}


def served(words: list[str]) -> ServeConfig:
    name, values = parsed(words)
    assert name == "serve"
    return ServeConfig.build({key: value for key, value in values.items() if key in ServeConfig.model_fields})


def test_there_is_something_to_check_and_the_page_names_every_file() -> None:
    assert NAMES == ["canary", "move-alias", "serve", "vllm"]
    assert len(PODS) == 4
    assert set(re.findall(r"examples/kubernetes/([\w-]+)\.yaml", PAGE)) == set(NAMES)


@pytest.mark.parametrize(("where", "spec"), PODS, ids=[where for where, _ in PODS])
def test_every_container_runs_a_command_on_volumes_that_the_pod_has(where: str, spec: dict[str, Any]) -> None:
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    claims = {one["metadata"]["name"] for _, one in ALL if one["kind"] in ("PersistentVolumeClaim", "Secret")}
    for volume in spec["volumes"]:
        named = volume.get("persistentVolumeClaim", {}).get("claimName") or volume.get("secret", {}).get("secretName")
        assert named is None or named in claims
    for container in containers(spec):
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        for variable in container.get("env", []):
            secret = variable.get("valueFrom", {}).get("secretKeyRef")
            assert secret is None or secret["name"] in claims
        if container["image"] != "YOUR/IMAGE":
            continue
        assert "command" not in container, "the image's entrypoint is graft"
        name, values = parsed(container["args"])
        assert str(values["store"]) in mounts
        if name == "serve":
            config = served(container["args"])
            for path in (config.api_keys, config.out if config.engine == "vllm" else None):
                assert path is None or any(path.is_relative_to(mount) for mount in mounts), path


def test_probes_ask_endpoints_that_exist_on_the_port_that_is_served() -> None:
    paths = {route.path for route in router.routes}  # type: ignore[attr-defined]
    checked = 0
    for _, spec in PODS:
        for container in spec["containers"]:
            ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                probe = container.get(kind, {}).get("httpGet")
                if probe is None or container["image"] != "YOUR/IMAGE":
                    continue
                assert probe["path"] in paths
                assert ports[probe["port"]] == served(container["args"]).port
                assert probe["path"] == ("/readyz" if kind == "readinessProbe" else "/healthz")
                checked += 1
    assert checked == 6


def test_a_pod_has_longer_to_end_than_its_server_drains() -> None:
    drained = 0
    for where, spec in PODS:
        for container in spec["containers"]:
            if container["image"] == "YOUR/IMAGE" and container["args"][0] == "serve":
                sleep, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
                assert sleep == "sleep"
                needed = int(seconds) + served(container["args"]).drain_seconds + CLOSING_SECONDS
                assert spec["terminationGracePeriodSeconds"] > needed, where
                readiness = container["readinessProbe"]
                assert readiness["periodSeconds"] * readiness["failureThreshold"] <= int(seconds)
                drained += 1
    assert drained == 2


def test_services_routes_and_budgets_point_at_pods_that_are_there() -> None:
    labels = [one["spec"]["template"]["metadata"]["labels"] for _, one in ALL if one["kind"] == "Deployment"]
    services = {one["metadata"]["name"]: one["spec"] for _, one in ALL if one["kind"] == "Service"}
    for service in services.values():
        assert service["selector"] in labels
    for _, one in ALL:
        if one["kind"] == "Deployment":
            assert one["spec"]["selector"]["matchLabels"] == one["spec"]["template"]["metadata"]["labels"]
        if one["kind"] == "PodDisruptionBudget":
            assert one["spec"]["selector"]["matchLabels"] in labels
    (route,) = [one for _, one in ALL if one["kind"] == "HTTPRoute"]
    backends = route["spec"]["rules"][0]["backendRefs"]
    assert sum(backend["weight"] for backend in backends) == 100
    for backend in backends:
        assert services[backend["name"]]["ports"][0]["port"] == backend["port"]


def test_the_canary_is_the_same_server_over_another_store() -> None:
    usual, canary = (dict(PODS)[where] for where in ("serve/graft", "canary/graft-canary"))
    (one,), (other,) = (spec["containers"] for spec in (usual, canary))
    assert one["args"] == other["args"]
    assert one["resources"] == other["resources"]
    assert one["volumeMounts"][0] == {"name": "store", "mountPath": "/store", "subPath": "store", "readOnly": True}
    assert other["volumeMounts"][0] == {**one["volumeMounts"][0], "subPath": "canary"}


def test_the_keys_of_the_secret_are_keys(tmp_path: Path) -> None:
    (secret,) = [one for _, one in ALL if one["metadata"].get("name") == "graft-keys" and one["kind"] == "Secret"]
    (tmp_path / "keys.yaml").write_text(secret["stringData"]["keys.yaml"])
    team, operations = read_api_keys(tmp_path / "keys.yaml").tenants
    assert (team.may_use("formal"), team.may_use("other"), operations.admin) == (True, False, True)
    assert "change-me" in secret["stringData"]["keys.yaml"]


def test_the_command_of_vllm_is_the_one_that_graft_prints_with_room_for_more() -> None:
    spec = dict(PODS)["vllm/vllm"]
    (sidecar,), (vllm,) = spec["initContainers"], spec["containers"]
    assert sidecar["restartPolicy"] == "Always", "a sidecar, and not a step before"
    config = served(sidecar["args"])
    assert config.follow == "http://127.0.0.1:8000"
    printed = _command(config, 16, {"formal": config.out})
    words = vllm["command"]
    flags = [word for word in words if word.startswith("--")]
    assert set(flags) == {word for word in printed if word.startswith("--")} - {"--lora-modules"}
    assert words[:3] == [word for word in printed if "=" not in word][:3]
    environment = {variable["name"]: variable for variable in vllm["env"]}
    assert f"VLLM_ALLOW_RUNTIME_LORA_UPDATING={environment['VLLM_ALLOW_RUNTIME_LORA_UPDATING']['value']}" == printed[0]
    assert environment["VLLM_API_KEY"] in sidecar["env"]
    assert sidecar["readinessProbe"]["exec"]["command"][-1] == str(config.out / follower.IN_STEP)
    (shared,) = [mount for mount in vllm["volumeMounts"] if mount["name"] == "adapters"]
    assert shared["mountPath"] == str(config.out), "vLLM is told the follower's path"


def test_no_service_sets_a_variable_that_vllm_reads() -> None:
    # For a Service `vllm` Kubernetes sets VLLM_PORT=tcp://..., with which vLLM does not start (vLLM #34199).
    assert dict(PODS)["vllm/vllm"]["enableServiceLinks"] is False
    for _, one in ALL:
        assert one["kind"] != "Service" or not one["metadata"]["name"].startswith("vllm"), "other pods have links"


def test_no_graft_container_runs_as_root_and_all_that_serve_have_limits() -> None:
    for where, spec in PODS:
        for container in containers(spec):
            if container["image"] == "YOUR/IMAGE":
                context = {**spec.get("securityContext", {}), **container.get("securityContext", {})}
                assert context["runAsNonRoot"], where
                assert f"USER {context['runAsUser']}" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
                if container["args"][0] == "serve":
                    assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
