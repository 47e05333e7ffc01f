"""What `deploy/` holds: it parses, its command lines are ours, and nothing secret stands in it."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from starlette.testclient import TestClient

from chaccu.cli.main import app
from chaccu.serve.gateway.app import create_gateway
from chaccu.serve.gateway.config import GatewayConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted((DEPLOY / "docker").glob("*.Dockerfile"))
CHART = DEPLOY / "helm" / "chaccu"
KUBERNETES = "1.34"
# What other programs read.
FOREIGN_VARIABLES = {"PATH", "PYTHONUNBUFFERED", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"}
# Those that we use, of the Compose specification.
COMPOSE_KEYS = {
    "image",
    "build",
    "user",
    "command",
    "environment",
    "secrets",
    "ports",
    "tmpfs",
    "healthcheck",
    "volumes",
    "depends_on",
    "deploy",
    "profiles",
    "stop_grace_period",
    "restart",
    "read_only",
    "cap_drop",
    "security_opt",
}
CHART_VALUES: dict[str, dict[str, Any]] = {
    "as it comes": {"auth": {"keys": "{}"}},
    "everything on": {
        "auth": {"existingSecret": "ours"},
        "gateway": {
            "args": ["--alias", "gpt=tuned"],
            "hpa": {"enabled": True},
            "nodeSelector": {"disk": "ssd"},
            "tolerations": [{"operator": "Exists"}],
        },
        "sharedState": {"existingSecret": "redis", "whenDown": "refuse"},
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "workers": [
            {
                "name": "small",
                "image": "chaccu-worker-cpu:0.1.0",
                "model": "Qwen/Qwen3-0.6B",
                "servedAs": "small model",
                "args": ["--format", "tokenizer", "--slots", "8"],
                "replicas": 0,
            },
            {
                "name": "big",
                "image": "chaccu-worker-cuda:0.1.0",
                "model": "/models/big",
                "servedAs": "big",
                "gpus": 2,
                "modelsClaim": "weights",
                "resources": {"limits": {"memory": "64Gi"}},
                "keda": {
                    "enabled": True,
                    "minReplicas": 1,
                    "maxReplicas": 4,
                    "prometheus": "http://prometheus:9090",
                    "waitingPerWorker": 4,
                    "runningPerWorker": 48,
                    "cooldownSeconds": 600,
                },
            },
        ],
    },
}


def parse(words: list[str]) -> None:
    """Read a command line as `chaccu` would. Raises click's errors for what it would refuse."""
    assert words, "a command line is empty"
    command = typer.main.get_command(app)
    words = list(words)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
    assert not getattr(command, "commands", {}), f"there is no command {words[:1]}"
    command.make_context("chaccu", words)


def known_variables(command: Any = None) -> set[str]:
    """Environment variables that some option reads."""
    command = typer.main.get_command(app) if command is None else command
    found = {one.envvar for one in command.params if isinstance(getattr(one, "envvar", None), str)}
    return found.union(*(known_variables(child) for child in getattr(command, "commands", {}).values()))


def check_variables(names: set[str]) -> None:
    unread = names - known_variables() - FOREIGN_VARIABLES
    assert not unread, f"nothing reads {sorted(unread)}"


def is_pinned(image: str) -> bool:
    """Whether an image has a tag that is not `latest`."""
    tag = image.rpartition("/")[2].partition(":")[2]
    return bool(tag) and tag != "latest"


def instructions(file: Path) -> list[tuple[str, str]]:
    """A Dockerfile's instructions, without comments, each on one line."""
    text = "\n".join(line for line in file.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#"))
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(word.upper(), rest.strip()) for line in lines if line.strip() for word, _, rest in [line.strip().partition(" ")]]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_an_image_is_pinned_runs_as_nobody_special_and_starts_our_command(file: Path) -> None:
    steps = instructions(file)
    images = [rest.partition(" ")[0] for word, rest in steps if word == "FROM"]
    assert images
    assert all(is_pinned(image) for image in images)
    users = [rest for word, rest in steps if word == "USER"]
    assert users[-1] == "10001", "a number, so that runAsNonRoot can be checked"
    assert [json.loads(rest) for word, rest in steps if word == "ENTRYPOINT"] == [["chaccu"]]
    (command,) = [json.loads(rest) for word, rest in steps if word == "CMD"]
    parse(command)
    names = {name for word, rest in steps if word == "ENV" for name in re.findall(r"(\w+)=", rest)}
    check_variables(names)
    assert not any(re.search("TOKEN|SECRET|PASSWORD", rest) for word, rest in steps if word in ("ENV", "ARG"))
    extras = set(re.findall(r"/source\[([\w,-]+)\]", file.read_text(encoding="utf-8"))[0].split(","))
    declared = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert extras <= set(declared)
    assert ("train" in extras) == ("worker" in file.name), "a gateway has no torch"


def test_a_build_sees_no_keys_and_no_weights() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    let_in = [line[1:] for line in lines if line.startswith("!")]
    assert let_in
    assert all((ROOT / name).exists() for name in let_in)
    for needed in ("pyproject.toml", "README.md", "LICENSE", "src", "constraints.txt"):
        assert needed in let_in


def test_the_compose_file_holds_together() -> None:
    text = (DEPLOY / "docker-compose.yaml").read_text(encoding="utf-8")
    compose = yaml.safe_load(text)
    assert compose.keys() <= {"name", "services", "secrets", "x-hardened", "x-worker"}
    services = compose["services"]
    for name, service in services.items():
        assert is_pinned(service["image"]), name
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"]), name
        assert set(service.get("depends_on", ())) <= services.keys(), name
        assert set(service.get("secrets", ())) <= compose["secrets"].keys(), name
        assert service.keys() <= COMPOSE_KEYS, name
        if "build" in service:
            built = service["build"]
            assert (DEPLOY / built["context"] / built["dockerfile"]).is_file(), name
            assert (DEPLOY / built["context"]).resolve() == ROOT
            parse([re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in service["command"]])
            check_variables(set(service.get("environment", {})))
    assert services["gateway"]["environment"]["CHACCU_JOIN_TOKEN"].startswith("${CHACCU_JOIN_TOKEN:?")
    assert services["gateway"]["healthcheck"]["test"][0] == "CMD"
    assert all(port.startswith("127.0.0.1:") for port in services["gateway"]["ports"])


def render(values: dict[str, Any]) -> list[dict[str, Any]]:
    helm = pytest.importorskip("helm_python", reason="pip install helm-python-sdk")
    with helm.Chart.load(CHART) as chart:
        shown = chart.render(values=values, name="demo", namespace="models")
    return [one for path, text in shown.items() if path.endswith(".yaml") for one in yaml.safe_load_all(text) if one]


def containers(objects: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for one in objects:
        if one["kind"] == "Deployment":
            yield from one["spec"]["template"]["spec"]["containers"]


@pytest.mark.parametrize("values", CHART_VALUES.values(), ids=CHART_VALUES.keys())
def test_helm_finds_nothing_wrong_with_the_chart(values: dict[str, Any]) -> None:
    helm = pytest.importorskip("helm_python", reason="pip install helm-python-sdk")
    report = helm.lint(CHART, values, strict=True)
    assert report["errors"] == []
    # 1: information.
    assert [message for message in report["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize("values", CHART_VALUES.values(), ids=CHART_VALUES.keys())
def test_the_chart_gives_objects_that_kubernetes_knows(values: dict[str, Any]) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    objects = render(values)
    assert len({(one["kind"], one["metadata"]["name"]) for one in objects}) == len(objects)
    for one in objects:
        # Of other projects, whose schemas are not Kubernetes' own.
        if one["kind"] not in ("ServiceMonitor", "ScaledObject"):
            kubernetes_validate.validate(one, KUBERNETES, strict=True)


@pytest.mark.parametrize("values", CHART_VALUES.values(), ids=CHART_VALUES.keys())
def test_the_charts_pods_run_our_commands_and_hold_no_secret(values: dict[str, Any]) -> None:
    objects = render(values)
    found = list(containers(objects))
    assert len(found) == 1 + len(values.get("workers", [None]))
    for container in found:
        parse(container["args"])
        assert is_pinned(container["image"])
        check_variables({variable["name"] for variable in container["env"]})
        secret = {variable["name"]: variable for variable in container["env"]}
        for name in ("CHACCU_JOIN_TOKEN", "CHACCU_SHARED_STATE"):
            assert name not in secret or "secretKeyRef" in secret[name]["valueFrom"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        named = {mount["name"] for mount in container["volumeMounts"]}
        pods = [one["spec"]["template"]["spec"] for one in objects if one["kind"] == "Deployment"]
        (pod,) = [pod for pod in pods if container in pod["containers"]]
        assert named == {volume["name"] for volume in pod["volumes"]}
        assert pod["securityContext"]["runAsNonRoot"] is True
    gateway = found[0]
    paths = {name: gateway[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    client = TestClient(create_gateway(GatewayConfig()))
    answers = {name: client.get(path).status_code for name, path in paths.items()}
    assert answers == {"startupProbe": 200, "livenessProbe": 200, "readinessProbe": 503}, "no worker has joined"


def test_workers_find_the_gateways_and_services_find_their_pods() -> None:
    objects = render(CHART_VALUES["everything on"])
    services = {one["metadata"]["name"]: one["spec"] for one in objects if one["kind"] == "Service"}
    for container in containers(objects):
        if container["name"] == "worker":
            url = container["args"][container["args"].index("--gateway") + 1]
            host, port = url.removeprefix("dns+http://").split(":")
            assert services[host]["clusterIP"] == "None"
            assert services[host]["publishNotReadyAddresses"], "else a gateway without workers would never get one"
            assert services[host]["ports"][0]["port"] == int(port)
    labels = [one["spec"]["template"]["metadata"]["labels"] for one in objects if one["kind"] == "Deployment"]
    selectors = [
        one["spec"]["selector"].get("matchLabels", one["spec"]["selector"])
        for one in objects
        if one["kind"] in ("Service", "PodDisruptionBudget")
    ]
    for selector in selectors:
        assert sum(selector.items() <= one.items() for one in labels) == 1
    (monitor,) = [one["spec"] for one in objects if one["kind"] == "ServiceMonitor"]
    watched = [
        one
        for one in objects
        if one["kind"] == "Service" and monitor["selector"]["matchLabels"].items() <= one["metadata"]["labels"].items()
    ]
    assert len(watched) == 1, "counted twice, it would scale twice as far"


def test_what_scales_workers_is_in_the_metrics() -> None:
    triggers = [
        trigger["metadata"]
        for one in render(CHART_VALUES["everything on"])
        if one["kind"] == "ScaledObject"
        for trigger in one["spec"]["triggers"]
    ]
    queried = {name for trigger in triggers for name in re.findall(r"sum\(([\w:]+)\{", trigger["query"])}
    assert len(queried) == 2
    text = TestClient(create_gateway(GatewayConfig())).get("/metrics").text
    assert [name for name in queried if f"# TYPE {name} gauge" not in text] == []


def test_a_chart_without_keys_or_with_a_wrong_value_is_refused() -> None:
    helm = pytest.importorskip("helm_python", reason="pip install helm-python-sdk")
    with pytest.raises(helm.HelmError, match="existingSecret is needed"):
        render({})
    with pytest.raises(helm.HelmError, match="replicas"):
        render({"auth": {"keys": "{}"}, "gateway": {"replicas": 0}})


def test_the_skyserve_file_runs_our_command() -> None:
    service = yaml.safe_load((DEPLOY / "skyserve.yaml").read_text(encoding="utf-8"))
    (command,) = [line.partition("/bin/chaccu ")[2] for line in service["run"].splitlines()]
    parse([word.strip('"') for word in command.split()])
    assert f"--port {service['resources']['ports']}" in command
    policy = service["service"]["replica_policy"]
    assert service["resources"]["use_spot"]
    assert policy["base_ondemand_fallback_replicas"] >= 1
    assert TestClient(create_gateway(GatewayConfig())).get(service["service"]["readiness_probe"]["path"]).status_code == 503


@pytest.mark.skipif(importlib.util.find_spec("sky") is None, reason="pip install 'chaccu[cloud]'")
def test_skypilot_reads_the_skyserve_file(tmp_path: Path) -> None:
    program = """
import sys
import sky
task = sky.Task.from_yaml(sys.argv[1])
assert task.service is not None
print(task.service.min_replicas, task.service.max_replicas, [one.use_spot for one in task.resources])
"""
    (tmp_path / "deploy").mkdir()
    (tmp_path / "keys.json").write_text("{}")
    file = tmp_path / "deploy" / "skyserve.yaml"
    file.write_text((DEPLOY / "skyserve.yaml").read_text(encoding="utf-8"))
    read = subprocess.run([sys.executable, "-c", program, str(file)], cwd=tmp_path, capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    assert read.stdout.startswith("2 8 ")
