"""infra/monitoring: Prometheus and Grafana accept the files; each alert fires, resolves and has a runbook section."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.support import prometheus
from tests.support.environment import find_program
from tests.support.prometheus import CONFIG, DASHBOARD, MONITORING

plugins.register_default_plugins()
ROOT = Path(__file__).resolve().parents[2]
METRIC_MODULES = ("jobs/metrics.py", "producer/dispatcher/metrics.py", "workers/process/metrics.py")
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
OURS = re.compile(r"\bcutfleet_\w+")


def promtool(*args: str | Path) -> None:
    ran = subprocess.run([find_program("promtool"), *map(str, args)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def find_differences(given: Any, known: Any, path: str = "") -> list[str]:
    """Return the paths of values that are missing from `known`, or different there."""
    if isinstance(given, dict):
        return [
            where
            for name, value in given.items()
            for where in (
                find_differences(value, known[name], f"{path}/{name}")
                if isinstance(known, dict) and name in known
                else [f"{path}/{name}"]
            )
        ]
    if isinstance(given, list) and isinstance(known, list) and len(given) == len(known):
        pairs = enumerate(zip(given, known, strict=True))
        return [where for number, (a, b) in pairs for where in find_differences(a, b, f"{path}/{number}")]
    return [] if given == known else [path]


def schema_errors(dashboard: dict[str, Any]) -> list[str]:
    """Return the paths that a round trip through Grafana's types loses or changes."""
    return find_differences(dashboard, json.loads(JSONEncoder().encode(Dashboard.from_json(copy.deepcopy(dashboard)))))


def test_prometheus_accepts_configuration_and_rules() -> None:
    promtool("check", "config", MONITORING / "prometheus.yml")
    promtool("check", "rules", MONITORING / "rules.yml")


def test_each_alert_fires_and_resolves() -> None:
    file = Path(__file__).with_name("rules_test.yml")
    tests = yaml.safe_load(file.read_text())["tests"]
    outcomes: dict[str, list[bool]] = {rule["alert"]: [] for rule in prometheus.rules()}
    for check in (check for test in tests for check in test["alert_rule_test"]):
        outcomes[check["alertname"]].append(bool(check["exp_alerts"]))

    promtool("test", "rules", file)

    assert {name: (True in fired, fired[-1]) for name, fired in outcomes.items()} == dict.fromkeys(
        outcomes, (True, False)
    )


@pytest.mark.parametrize("rule", prometheus.rules(), ids=lambda rule: str(rule["alert"]))
def test_each_alert_has_a_runbook_section(rule: dict[str, Any]) -> None:
    page, _, anchor = rule["annotations"]["runbook"].partition("#")

    sections = re.findall(r"^## (.+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor in {section.lower() for section in sections}
    assert rule["alert"] in sections
    assert rule["labels"]["severity"] in ("critical", "warning")


def test_the_dashboard_matches_grafanas_schema() -> None:
    assert schema_errors(DASHBOARD) == []
    assert schema_errors(DASHBOARD | {"panels": [DASHBOARD["panels"][0] | {"titel": "x"}]}) == ["/panels/0/titel"]


def test_prometheus_parses_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    expressions = prometheus.panel_queries(window="1m")
    rules = [{"record": f"panel:{number}", "expr": expr} for number, (_, expr) in enumerate(expressions)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))

    promtool("check", "rules", tmp_path / "rules.yml")

    assert {panel["title"] for panel in DASHBOARD["panels"]} == {title for title, _ in expressions}
    assert not [expr for _, expr in expressions if "$" in expr]


def test_rules_and_dashboard_use_existing_metrics_only() -> None:
    known = {name for module in METRIC_MODULES for name in OURS.findall((ROOT / module).read_text())}

    used = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for expr in [
            *(rule["expr"] for rule in prometheus.rules()),
            *(e for _, e in prometheus.panel_queries(window="1m")),
        ]
        for name in OURS.findall(expr)
    }
    assert used - known == set()


def test_compose_starts_the_services_that_prometheus_scrapes() -> None:
    (job,) = CONFIG["scrape_configs"]
    (found,) = job["dns_sd_configs"]

    serving = {name for name, service in COMPOSE.items() if "CUTFLEET_METRICS_PORT" in str(service.get("environment"))}
    assert {"dispatcher", "worker-cpu", "worker-gpu"} <= serving & set(found["names"])
    assert COMPOSE["dispatcher"]["environment"]["CUTFLEET_METRICS_PORT"] == str(found["port"])
    for name in ("prometheus", "grafana"):
        mounted = [volume.split(":")[0] for volume in COMPOSE[name]["volumes"] if volume.startswith("./")]
        assert mounted
        assert all((ROOT / path).exists() for path in mounted)
