"""The Helm chart and the manifests of deploy/, rendered by Helm's own engine and held against Kubernetes' schemas."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from modelpress_server.cli import ByteSize
from modelpress_server.config import Settings

helm = pytest.importorskip("helm_python", reason="no Helm: pip install 'modelpress[charts]'")
schemas = pytest.importorskip("kubernetes_validate", reason="no schemas: pip install 'modelpress[charts]'")

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "helm" / "modelpress"
KUBERNETES = ("1.27", "1.37")  # the oldest that the chart names, and the newest whose schemas are at hand
CRDS = ("ServiceMonitor", "ScaledJob", "TriggerAuthentication")
WORKLOADS = ("Deployment", "Job")

VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": {
        "blobs": {"endpoint": "https://minio:9000", "keysSecret": "bucket", "port": 9000},
        "settings": {"jwt_issuer": "https://login.example", "jwt_audience": "modelpress", "max_queued_jobs": 500},
        "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/models"}},
        "server": {"autoscaling": {"enabled": True}, "console": True, "nodeSelector": {"disk": "ssd"}},
        "workers": {"autoscaling": {"metricLabels": {"project": "default"}}, "tolerations": [{"operator": "Exists"}]},
        "networkPolicy": {
            "clients": [{"namespaceSelector": {}}],
            "egressTo": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
            "egressPorts": [4317],
        },
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "imagePullSecrets": [{"name": "registry"}],
    },
    "insecure": {
        "insecure": True,
        "tls": {"secretName": ""},
        "tokens": {"secretName": ""},
        "database": {"passwordSecret": {"name": "", "key": ""}},
        "serviceMonitor": {"enabled": True},
        "workers": {"autoscaling": {"enabled": False}},
    },
    "ray": {"ray": {"address": "ray://head:10001", "measureOn": "bench=quiet"}},
    "little": {"podDisruptionBudget": {"enabled": False}, "networkPolicy": {"enabled": False}},
}


def rendered(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The documents that `helm template` makes of the chart."""
    with helm.Chart.load(CHART) as chart:
        texts = chart.render(values, name="release", namespace="models")
    made = (yaml.safe_load_all(text) for path, text in texts.items() if not path.endswith("NOTES.txt"))
    return [document for documents in made for document in documents if document]


def manifests(name: str) -> list[dict[str, Any]]:
    """The documents of a file of deploy/kubernetes."""
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text("utf-8")))


@pytest.fixture(params=VALUES)
def documents(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The chart with each of the values."""
    return rendered(VALUES[request.param])


def of_kind(documents: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    return [document for document in documents if document["kind"] in kinds]


def pods(documents: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The pods that are made from templates."""
    for document in of_kind(documents, *WORKLOADS):
        yield document["spec"]["template"]


def validate(document: dict[str, Any]) -> None:
    """Against the schemas, unknown fields refused."""
    for version in KUBERNETES:
        schemas.validate(document, version, strict=True)


def check_pod(pod: dict[str, Any]) -> None:
    """It has no powers, writes to its own volumes alone, and every setting that it is given is one of the server's."""
    spec = pod["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "memory" in container["resources"]["limits"]
    assert {volume["name"] for volume in spec["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}
    names = [entry["name"] for entry in container["env"]]
    assert len(names) == len(set(names))
    settings = {name.removeprefix("COMPRESS_SERVER_").lower() for name in names if name.startswith("COMPRESS_SERVER_")}
    assert settings <= {setting.name for setting in fields(Settings)}
    settings_of(container)  # they go together


def settings_of(container: dict[str, Any]) -> Settings:
    """What the server makes of its environment; secrets have some value."""
    found: dict[str, Any] = {"listen": "0.0.0.0:50051"}
    if "work" in container.get("command", ()):
        del found["listen"]
    kinds = {setting.name: setting for setting in fields(Settings)}
    for entry in container["env"]:
        name, value = entry["name"].removeprefix("COMPRESS_SERVER_").lower(), entry.get("value", "postgresql://secret")
        if name in kinds and entry["name"] != name:
            kind = kinds[name].metadata["kind"]
            if kind == "bytes":
                value = ByteSize().convert(value, None, None)
            elif kind == "path":
                value = Path(value)
            elif kind == "flag":
                value = value == "true"
            elif isinstance(kinds[name].default, int | float):
                value = type(kinds[name].default)(value)
            found[name] = value
    return Settings(**found)


def test_lint() -> None:
    """Helm finds nothing to complain of but that there is no icon."""
    report = helm.lint(CHART, strict=True)
    assert report["errors"] == []
    assert [message["error"] for message in report["messages"]] == ["icon is recommended"]


def test_documents_are_valid(documents: list[dict[str, Any]]) -> None:
    """By the schemas of the oldest and the newest Kubernetes; names are there once."""
    for document in documents:
        assert document["metadata"]["labels"]["app.kubernetes.io/instance"] == "release"
        if document["kind"] not in CRDS:
            validate(document)
    names = [(document["kind"], document["metadata"]["name"]) for document in documents]
    assert len(names) == len(set(names))


def test_pods(documents: list[dict[str, Any]]) -> None:
    """All are confined, and have probes."""
    found = list(pods(documents))
    assert found
    for pod in found:
        check_pod(pod)
        (container,) = pod["spec"]["containers"]
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()
        assert pod["spec"]["terminationGracePeriodSeconds"] > settings_of(container).drain_grace_s


def test_what_selects_finds(documents: list[dict[str, Any]]) -> None:
    """Service, budgets, policies, autoscalers and the monitor each mean pods that there are."""
    labels = [pod["metadata"]["labels"] for pod in pods(documents)]
    workloads = {document["metadata"]["name"]: document for document in of_kind(documents, *WORKLOADS)}

    def selects(selector: dict[str, str], among: list[dict[str, str]]) -> int:
        return sum(selector.items() <= one.items() for one in among)

    for document in documents:
        spec = document.get("spec", {})
        if document["kind"] == "Service":
            assert selects(spec["selector"], labels) == 1
            container = workloads["release-modelpress-server"]["spec"]["template"]["spec"]["containers"][0]
            assert {port["targetPort"] for port in spec["ports"]} == {port["name"] for port in container["ports"]}
        elif document["kind"] in ("Deployment", "PodDisruptionBudget"):
            assert selects(spec["selector"]["matchLabels"], labels) == 1
        elif document["kind"] == "NetworkPolicy":
            assert selects(spec["podSelector"]["matchLabels"], labels) == 1
        elif document["kind"] == "HorizontalPodAutoscaler":
            target = workloads[spec["scaleTargetRef"]["name"]]
            assert "replicas" not in target["spec"]
        elif document["kind"] == "ServiceMonitor":
            services = [service["metadata"]["labels"] for service in of_kind(documents, "Service")]
            assert selects(spec["selector"]["matchLabels"], services) == 1
            assert spec["endpoints"][0]["port"] == "http"


def test_servers_leave_the_work_to_workers() -> None:
    """Servers run nothing, workers take jobs from the same stores; with Ray, the cluster's nodes do instead."""
    server, worker = of_kind(rendered({}), "Deployment")
    envs = [
        {entry["name"]: entry for entry in one["spec"]["template"]["spec"]["containers"][0]["env"]}
        for one in (server, worker)
    ]
    assert envs[0]["COMPRESS_SERVER_WORKERS"]["value"] == "0"
    for name in ("COMPRESS_SERVER_DATABASE", "PGPASSWORD", "COMPRESS_SERVER_BLOBS", "AWS_REGION"):
        assert envs[0][name] == envs[1][name]
    assert worker["spec"]["template"]["spec"]["containers"][0]["command"][-1] == "work"
    (alone,) = of_kind(rendered(VALUES["ray"]), "Deployment")
    settings = settings_of(alone["spec"]["template"]["spec"]["containers"][0])
    assert (settings.ray_address, settings.measure_on, settings.workers) == ("ray://head:10001", "bench=quiet", 8)


def test_workers_follow_the_age_of_the_queue() -> None:
    """By the metric that servers tell."""
    (scaler,) = of_kind(rendered({}), "HorizontalPodAutoscaler")
    (metric,) = scaler["spec"]["metrics"]
    assert metric["external"]["target"] == {"type": "Value", "value": "60"}
    told = (Path(__file__).parents[2] / "docs" / "operations.md").read_text("utf-8")
    assert f"`{metric['external']['metric']['name']}`" in told


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tls": {"secretName": ""}}, "Set tls.secretName"),
        ({"tokens": {"secretName": ""}}, "Set tokens.secretName"),
        ({"blobs": {"url": "/a/folder"}}, "blobs"),
        ({"settings": {"Not-A-Setting": 1}}, "Not-A-Setting"),
        ({"imagee": {}}, "imagee"),
    ],
)
def test_values_that_are_refused(values: dict[str, Any], message: str) -> None:
    """Nothing is served without protection by oversight; what cannot work says so before it is installed."""
    with pytest.raises(helm.HelmError, match=re.escape(message)):
        rendered(values)


def test_job() -> None:
    """The manifest of one task: valid, confined, and a command that there is."""
    (job,) = manifests("job.yaml")
    job["metadata"]["name"] = job["metadata"].pop("generateName") + "x"  # the schema of an object that was made
    validate(job)
    check_pod(job["spec"]["template"])
    assert job["spec"]["template"]["spec"]["containers"][0]["command"][-2:] == ["work", "--once"]


def test_scaled_job() -> None:
    """Made by KEDA, it makes the same Job; the query counts what is queued."""
    trigger, scaled = manifests("scaled-job.yaml")
    (job,) = manifests("job.yaml")
    assert scaled["spec"]["jobTargetRef"] == job["spec"]
    (one,) = scaled["spec"]["triggers"]
    assert one["authenticationRef"]["name"] == trigger["metadata"]["name"]
