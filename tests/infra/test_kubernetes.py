"""The Kubernetes manifests, built by kubectl: each matches its schema and agrees with the code."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from pydantic import ValidationError

from jobs.settings import PREFIX, Settings
from tests.support import prometheus
from tests.support.environment import find_program

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = ["cpu", "gpu"]
VERSIONS = ["1.30", "1.37"]  # the oldest that clouds still offer, and the newest
SPOT_NOTICE_S = 120
PAGE = (ROOT / "infra/kubernetes/README.md").read_text()
Object = dict[str, Any]


@cache
def build(overlay: str) -> list[Object]:
    return kustomize(ROOT / "infra/kubernetes" / overlay)


def kustomize(folder: Path) -> list[Object]:
    built = subprocess.run(
        [find_program("kubectl"), "kustomize", str(folder)], check=True, capture_output=True, text=True
    ).stdout
    return list(yaml.safe_load_all(built))


def find(overlay: str, kind: str, name: str) -> Object:
    (found,) = (o for o in build(overlay) if (o["kind"], o["metadata"]["name"]) == (kind, name))
    return found


def pods(overlay: str) -> dict[str, Object]:
    """Return the pod specification of each workload, by the workload's name."""
    workloads = (o for o in build(overlay) if o["kind"] in ("Deployment", "StatefulSet"))
    return {o["metadata"]["name"]: o["spec"]["template"]["spec"] for o in workloads}


def check_scaled_object(document: Object) -> None:
    """Validate against KEDA's resource definition; an unknown field is an error too."""
    read = ScaledObject.model_validate(document).model_dump(mode="json", by_alias=True, exclude_unset=True)
    assert read == document


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_matches_its_schema(overlay: str, version: str) -> None:
    for document in build(overlay):
        if document["apiVersion"].startswith("keda.sh/"):
            check_scaled_object(document)
        else:
            kubernetes_validate.validate(document, version, strict=True)


def test_the_schemas_reject_mistakes() -> None:
    worker = find("gpu", "Deployment", "worker")
    scaling = find("gpu", "ScaledObject", "worker")

    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(worker | {"spec": worker["spec"] | {"replica": 1}}, VERSIONS[-1], strict=True)
    with pytest.raises((ValidationError, AssertionError)):
        check_scaled_object(scaling | {"spec": scaling["spec"] | {"minReplicas": 0}})


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_has_minimal_privileges(overlay: str) -> None:
    for name, pod in pods(overlay).items():
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False, "variables of Services would look like settings"
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "memory" in container["resources"]["limits"]
            assert "livenessProbe" in container or container.get("command") == ["sleep", "infinity"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_jobs_are_submitted_by_an_account_that_may_read_sources(overlay: str) -> None:
    pods_in_commands = re.findall(r"exec (?:-it )?deploy/(\w+) -- cutfleet", PAGE)

    assert pods_in_commands
    for name in pods_in_commands:
        account = pods(overlay)[name]["serviceAccountName"]
        assert find(overlay, "ServiceAccount", account)
        policy = json.loads((ROOT / f"infra/aws/{account}.json").read_text())
        read = [arn for one in policy["Statement"] if "s3:GetObject" in one["Action"] for arn in one["Resource"]]
        assert "arn:aws:s3:::SOURCE/*" in read


def test_the_patch_in_the_readme_opens_the_network(tmp_path: Path) -> None:
    (patch,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    shutil.copytree(ROOT / "infra/kubernetes", tmp_path / "kubernetes")
    (tmp_path / "kubernetes/own").mkdir()
    (tmp_path / "kubernetes/own/kustomization.yaml").write_text(f"resources: [../gpu]\n{patch}")

    (before,) = (o for o in build("gpu") if is_policy(o))
    (after,) = (o for o in kustomize(tmp_path / "kubernetes/own") if is_policy(o))

    kubernetes_validate.validate(after, VERSIONS[-1], strict=True)
    ports, *roles = after["spec"]["egress"][1:]
    assert ports["ports"] == [*before["spec"]["egress"][1]["ports"], {"protocol": "TCP", "port": 9000}]
    assert "to" not in ports
    assert [role["to"][0]["ipBlock"]["cidr"] for role in roles] == ["169.254.170.23/32", "169.254.169.254/32"]
    assert {port["port"] for role in roles for port in role["ports"]} == {80}


def is_policy(document: Object) -> bool:
    return bool(document["kind"] == "NetworkPolicy" and document["metadata"]["name"] == "cutfleet")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_variable_is_a_setting_and_no_file_contains_a_secret(overlay: str) -> None:
    plain = [o["data"] for o in build(overlay) if o["kind"] == "ConfigMap"]
    named = [env for pod in pods(overlay).values() for c in pod["containers"] for env in c.get("env", [])]
    names = {name for data in plain for name in data} | {env["name"] for env in named}

    assert {name for name in names - {"FLOWER_BASIC_AUTH"} if not is_setting(name)} == set()
    assert {env["name"] for env in named if "valueFrom" in env} == {"CUTFLEET_REDIS_URL", "FLOWER_BASIC_AUTH"}
    assert not [o for o in build(overlay) if o["kind"] == "Secret"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_grace_period_is_between_drain_time_and_spot_notice(overlay: str) -> None:
    grace_s = pods(overlay)["worker"]["terminationGracePeriodSeconds"]

    assert Settings.model_fields["drain_s"].default < grace_s < SPOT_NOTICE_S


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_check_the_file_that_the_process_touches(overlay: str) -> None:
    for name in ("worker", "dispatcher"):
        (container,) = pods(overlay)[name]["containers"]
        (file,) = (env["value"] for env in container["env"] if env["name"] == "CUTFLEET_ALIVE_FILE")

        assert file in container["livenessProbe"]["exec"]["command"][-1]
        assert any(file.startswith(mount["mountPath"] + "/") for mount in container["volumeMounts"]), (
            "the file must be writable"
        )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_probe_fails_on_an_old_file_and_on_none(overlay: str, tmp_path: Path) -> None:
    (container,) = pods(overlay)["worker"]["containers"]
    file = tmp_path / "alive"
    command = [text.replace("/tmp/alive", str(file)) for text in container["livenessProbe"]["exec"]["command"]]  # noqa: S108

    def is_alive() -> bool:
        return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0

    assert not is_alive()
    file.touch()
    assert is_alive()
    subprocess.run(["touch", "-d", "2 minutes ago", str(file)], check=True)
    assert not is_alive()


def test_one_pod_takes_one_gpu() -> None:
    (container,) = pods("gpu")["worker"]["containers"]

    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" in [toleration["key"] for toleration in pods("gpu")["worker"]["tolerations"]]
    assert "nvidia.com/gpu" not in str(pods("cpu")["worker"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_scaling_uses_the_metric_and_the_model_of_the_overlay(overlay: str) -> None:
    (settings,) = (o["data"] for o in build(overlay) if o["kind"] == "ConfigMap")
    spec = find(overlay, "ScaledObject", "worker")["spec"]
    query = spec["triggers"][0]["metadata"]["query"]

    (metric, model) = re.fullmatch(r'sum\((\w+)\{model="([^"]+)"\}\)', query).groups()  # type: ignore[union-attr]
    assert f'"{metric}"' in (ROOT / "producer/dispatcher/metrics.py").read_text()
    assert model == settings["CUTFLEET_MODEL"]
    assert spec["minReplicaCount"] == 0
    assert "replicas" not in find(overlay, "Deployment", "worker")["spec"], "two would count"


def test_prometheus_finds_the_pods_as_the_job_that_alerts_and_dashboard_name(tmp_path: Path) -> None:
    file = ROOT / "infra/kubernetes/scrape.yml"
    (job,) = yaml.safe_load(file.read_text())["scrape_configs"]
    elsewhere = job | {"static_configs": [{"targets": ["10.0.0.1:9464"]}]}
    del elsewhere["kubernetes_sd_configs"]  # Debian's Prometheus is built without it
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump({"scrape_configs": [elsewhere]}))

    subprocess.run([find_program("promtool"), "check", "config", str(tmp_path / "prometheus.yml")], check=True)

    assert job["job_name"] == prometheus.CONFIG["scrape_configs"][0]["job_name"]
    assert job["kubernetes_sd_configs"][0]["namespaces"]["names"] == [
        find("gpu", "Namespace", "cutfleet")["metadata"]["name"]
    ]
    ports = [port for pod in pods("gpu").values() for c in pod["containers"] for port in c.get("ports", [])]
    assert [port["name"] for port in ports].count(job["relabel_configs"][0]["regex"]) == 2


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_selectors_select(overlay: str) -> None:
    labels = {
        name: o["spec"]["template"]["metadata"]["labels"]
        for o in build(overlay)
        if o["kind"] in ("Deployment", "StatefulSet")
        for name in [o["metadata"]["name"]]
    }
    for document in build(overlay):
        spec = document.get("spec", {})
        selector = spec.get("selector", {}).get("matchLabels") or spec.get("podSelector", {}).get("matchLabels") or {}
        assert any(selector.items() <= own.items() for own in labels.values()), document["metadata"]["name"]


def is_setting(name: str) -> bool:
    return name.startswith(PREFIX) and name[len(PREFIX) :].lower() in Settings.model_fields
