"""infra/monitoring: what Prometheus and Grafana take, and that each alert fires, is over, and has its page."""

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

from producer.dispatcher.metrics import DispatcherMetrics
from tests.support import prometheus
from tests.support.factories import program
from tests.support.prometheus import CONFIG, DASHBOARD, MONITORING
from workers.process.metrics import WorkerMetrics

plugins.register_default_plugins()
COMPOSE: dict[str, Any] = yaml.safe_load((MONITORING.parents[1] / "docker-compose.yml").read_text())["services"]
OURS = re.compile(r"\bcutfleet_\w+")


def promtool(*args: str | Path) -> None:
    ran = subprocess.run([program("promtool"), *map(str, args)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def not_in_schema(given: Any, known: Any, path: str = "") -> list[str]:
    """What Grafana's own types do not know, or know otherwise."""
    if isinstance(given, dict):
        return [
            where
            for name, value in given.items()
            for where in (
                not_in_schema(value, known[name], f"{path}/{name}")
                if isinstance(known, dict) and name in known
                else [f"{path}/{name}"]
            )
        ]
    if isinstance(given, list) and isinstance(known, list) and len(given) == len(known):
        pairs = enumerate(zip(given, known, strict=True))
        return [where for number, (a, b) in pairs for where in not_in_schema(a, b, f"{path}/{number}")]
    return [] if given == known else [path]


def problems(dashboard: dict[str, Any]) -> list[str]:
    return not_in_schema(dashboard, json.loads(JSONEncoder().encode(Dashboard.from_json(copy.deepcopy(dashboard)))))


def test_prometheus_takes_configuration_and_rules() -> None:
    promtool("check", "config", MONITORING / "prometheus.yml")
    promtool("check", "rules", MONITORING / "rules.yml")


def test_each_alert_fires_and_is_over() -> None:
    file = Path(__file__).with_name("rules_test.yml")
    tests = yaml.safe_load(file.read_text())["tests"]
    looks: dict[str, list[bool]] = {rule["alert"]: [] for rule in prometheus.rules()}
    for look in (look for test in tests for look in test["alert_rule_test"]):
        looks[look["alertname"]].append(bool(look["exp_alerts"]))

    promtool("test", "rules", file)

    assert {name: (True in fired, fired[-1]) for name, fired in looks.items()} == dict.fromkeys(looks, (True, False))


@pytest.mark.parametrize("rule", prometheus.rules(), ids=lambda rule: str(rule["alert"]))
def test_each_alert_has_a_section_of_the_runbook(rule: dict[str, Any]) -> None:
    page, _, anchor = rule["annotations"]["runbook"].partition("#")

    sections = re.findall(r"^## (.+)$", (MONITORING.parents[1] / page).read_text(), re.MULTILINE)
    assert anchor in {section.lower() for section in sections}
    assert rule["alert"] in sections
    assert rule["labels"]["severity"] in ("critical", "warning")


def test_the_dashboard_fits_grafanas_schema() -> None:
    assert problems(DASHBOARD) == []
    assert problems(DASHBOARD | {"panels": [DASHBOARD["panels"][0] | {"titel": "x"}]}) == ["/panels/0/titel"]


def test_prometheus_parses_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    asked = prometheus.expressions(window="1m")
    rules = [{"record": f"panel:{number}", "expr": expr} for number, (_, expr) in enumerate(asked)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))

    promtool("check", "rules", tmp_path / "rules.yml")

    assert {panel["title"] for panel in DASHBOARD["panels"]} == {title for title, _ in asked}
    assert not [expr for _, expr in asked if "$" in expr]


def test_only_metrics_that_there_are_are_asked_for() -> None:
    heads = "".join(Path(module.__globals__["__file__"]).read_text() for module in HEADS)
    known = set(OURS.findall(heads))

    asked = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for expr in [
            *(rule["expr"] for rule in prometheus.rules()),
            *(e for _, e in prometheus.expressions(window="1m")),
        ]
        for name in OURS.findall(expr)
    }
    assert asked - known == set()


HEADS = (DispatcherMetrics.__init__, WorkerMetrics.__init__, WorkerMetrics.listen)
"""Of the modules whose first lines list what there is."""


def test_compose_starts_what_the_configuration_names() -> None:
    (job,) = CONFIG["scrape_configs"]
    (found,) = job["dns_sd_configs"]

    serving = {name for name, service in COMPOSE.items() if "CUTFLEET_METRICS_PORT" in str(service.get("environment"))}
    assert {"dispatcher", "worker-cpu", "worker-gpu"} <= serving & set(found["names"])
    assert COMPOSE["dispatcher"]["environment"]["CUTFLEET_METRICS_PORT"] == str(found["port"])
    for name in ("prometheus", "grafana"):
        mounted = [volume.split(":")[0] for volume in COMPOSE[name]["volumes"] if volume.startswith("./")]
        assert mounted
        assert all((MONITORING.parents[1] / path).exists() for path in mounted)
