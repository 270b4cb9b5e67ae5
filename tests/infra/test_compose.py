"""docker-compose.yml, checked without a Docker engine: schema, variables, and required properties of each service."""

from __future__ import annotations

import json
import re
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema.validators import validator_for

from jobs.settings import PREFIX, Settings
from tests.support.environment import find_program

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name for name, service in SERVICES.items() if service["image"].startswith("cutfleet-")}
OTHERS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"}  # read by boto3
OF_COMPOSE = {"COMPOSE_PROFILES", "MODELS", "VALKEY_MAXMEMORY"}
EXAMPLE = (ROOT / "infra/compose/example.env").read_text()


def schema_errors(document: Any) -> list[str]:
    """Validate against the Compose specification's schema, which check-jsonschema contains."""
    schema = json.loads(files("check_jsonschema").joinpath("builtin_schemas/vendor/compose-spec.json").read_text())
    return [error.message for error in validator_for(schema)(schema).iter_errors(document)]


def is_setting(variable: str) -> bool:
    return variable.startswith(PREFIX) and variable[len(PREFIX) :].lower() in Settings.model_fields


def test_the_file_matches_the_compose_specification() -> None:
    assert schema_errors(COMPOSE) == []


def test_the_override_for_two_gpus_matches_the_specification() -> None:
    class Merging(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
        pass

    Merging.add_constructor("!override", lambda loader, node: loader.construct_sequence(node, deep=True))
    second = yaml.load((ROOT / "infra/compose/two-gpus.yml").read_text(), Merging)  # noqa: S506  (a safe loader)

    assert schema_errors(second) == []
    assert {service["extends"]["service"] for service in second["services"].values()} <= set(SERVICES)


def test_the_override_for_two_accounts_matches_the_specification() -> None:
    other = yaml.safe_load((ROOT / "infra/compose/two-accounts.yml").read_text())

    assert schema_errors(other) == []
    assert set(other["services"]) == {name for name in OURS if name not in ("dispatcher", "flower")}, (
        "services that read sources"
    )
    for service in other["services"].values():
        assert all(is_setting(name) or name == "AWS_SHARED_CREDENTIALS_FILE" for name in service["environment"])


def test_the_schema_rejects_mistakes() -> None:
    assert schema_errors(COMPOSE | {"services": {"worker": {"imagee": "x"}}})
    assert schema_errors(COMPOSE | {"services": {"worker": {"image": "x", "healthcheck": {"interval": 5}}}})


@pytest.mark.parametrize("name", sorted(OURS))
def test_every_variable_is_a_setting(name: str) -> None:
    variables = set(SERVICES[name]["environment"])

    flower = {variable for variable in variables if variable.startswith("FLOWER_")}
    assert {variable for variable in variables - OTHERS - flower if not is_setting(variable)} == set()
    assert flower == ({"FLOWER_BASIC_AUTH", "FLOWER_READ_ONLY"} if name == "flower" else set())


def test_the_example_has_every_variable_of_the_file() -> None:
    used = set(re.findall(r"\$\{(\w+)", TEXT))
    offered = set(re.findall(r"^#?([A-Z_0-9]+)=", EXAMPLE, re.MULTILINE))

    assert {name for name in offered - used if name not in OF_COMPOSE} == set(), "variables that the file does not read"
    assert {name for name in used if not is_setting(name)} <= OTHERS | OF_COMPOSE | {"FLOWER_BASIC_AUTH"}
    assert {name for name in used if f"${{{name}:?" in TEXT} <= offered, "required variables"


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_service_restarts_and_is_sandboxed(name: str) -> None:
    service = SERVICES[name]

    assert service["restart"] == ("no" if name == "cutfleet" else "always")
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert re.search(rf"^  {name}:.*?stop_grace_period: \d+s  # \w", TEXT + "\n", re.MULTILINE | re.DOTALL) or (
        name.startswith("worker-")
    ), "a stop_grace_period needs its reason in a comment"
    dockerfile = ROOT / "infra/docker" / f"{service['image'].removeprefix('cutfleet-')}.Dockerfile"
    assert "healthcheck" in service or "HEALTHCHECK" in dockerfile.read_text()


def test_the_grace_period_of_a_worker_exceeds_its_drain_time() -> None:
    for name in ("worker-gpu", "worker-cpu"):
        grace_s = float(SERVICES[name]["stop_grace_period"].removesuffix("s"))

        assert grace_s > Settings.model_fields["drain_s"].default


def test_a_folder_of_weights_can_replace_the_volume() -> None:
    for name in ("worker-gpu", "worker-cpu"):
        assert SERVICES[name]["volumes"] == ["${MODELS:-models}:/models"]

    assert "models" in COMPOSE["volumes"]
    assert "HF_HOME=/models" in (ROOT / "infra/docker/worker.Dockerfile").read_text()


def test_only_the_gpu_worker_reserves_a_gpu() -> None:
    reserved = {name: str(service["deploy"]) for name, service in SERVICES.items() if "deploy" in service}

    assert list(reserved) == ["worker-gpu"]
    assert "'capabilities': ['gpu']" in reserved["worker-gpu"]


def test_flower_requires_a_login_and_is_read_only() -> None:
    environment = SERVICES["flower"]["environment"]

    assert environment["FLOWER_READ_ONLY"] == "true"
    assert environment["FLOWER_BASIC_AUTH"] == "${FLOWER_BASIC_AUTH:-}", "empty: Flower does not start"


def test_container_images_are_pinned_to_a_version() -> None:
    for service in SERVICES.values():
        if not service["image"].startswith("cutfleet-"):
            assert re.search(r":v?\d+\.\d+", service["image"])


@pytest.mark.parametrize("name", ["producer", "worker"])
def test_dockerfiles_pass_hadolint(name: str) -> None:
    subprocess.run([find_program("hadolint"), str(ROOT / f"infra/docker/{name}.Dockerfile")], check=True)
