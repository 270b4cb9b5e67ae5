"""Prometheus as `infra/monitoring` configures it, for processes of this machine, with shorter times."""

from __future__ import annotations

import copy
import json
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import yaml

from producer.demo.local_stack import Process, free_port, inherited_environment
from tests.support.environment import ROOT, find_program
from tests.support.waiting import wait_until

MONITORING = ROOT / "infra/monitoring"
CONFIG: dict[str, Any] = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
RULES: dict[str, Any] = yaml.safe_load((MONITORING / "rules.yml").read_text())
DASHBOARD: dict[str, Any] = json.loads((MONITORING / "grafana/dashboards/cutfleet.json").read_text())
SPEEDUP = 100
"""The rules' durations are divided by this."""
SCRAPE_S = 0.5


def rules() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def shortened_rules() -> dict[str, Any]:
    """Return the rules with each duration (`for`, windows, seconds that an image waits) divided by `SPEEDUP`."""
    document = copy.deepcopy(RULES)
    for rule in (rule for group in document["groups"] for rule in group["rules"]):
        rule["expr"] = re.sub(r"\[(\d+m)\]", lambda found: f"[{_shorten(found[1])}]", rule["expr"])
        rule["expr"] = re.sub(
            r"(_oldest_seconds\S+ > )(\d+)$", lambda found: f"{found[1]}{int(found[2]) / SPEEDUP}", rule["expr"]
        )
        if "for" in rule:
            rule["for"] = _shorten(rule["for"])
    return document


def panel_queries(*, window: str, gpu_hour: float = 1) -> list[tuple[str, str]]:
    """Return panel title and query of everything that the dashboard shows, with Grafana's variables filled in."""
    filled: list[tuple[str, str]] = []
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            expr = target["expr"].replace("$__rate_interval", window).replace("$gpu_hour", str(gpu_hour))
            filled.append((panel["title"], expr))
    return filled


class Prometheus:
    """A server that scrapes `ports` of 127.0.0.1 during a `with` block."""

    def __init__(self, folder: Path, ports: Sequence[int]) -> None:
        config = copy.deepcopy(CONFIG)
        config["global"] = {name: f"{int(SCRAPE_S * 1000)}ms" for name in config["global"]}
        config["global"]["scrape_timeout"] = config["global"]["scrape_interval"]
        (job,) = config["scrape_configs"]
        del job["dns_sd_configs"], job["relabel_configs"]
        job["static_configs"] = [{"targets": [f"127.0.0.1:{port}" for port in ports]}]
        folder.mkdir(parents=True)
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (folder / "rules.yml").write_text(yaml.safe_dump(shortened_rules()))
        self._folder = folder
        self._url = f"http://127.0.0.1:{free_port()}"

    def __enter__(self) -> Self:
        command = [
            find_program("prometheus"),
            f"--config.file={self._folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self._folder / 'data'}",
            f"--web.listen-address={self._url.removeprefix('http://')}",
        ]
        self._process = Process(command, log=self._folder / "log", env=inherited_environment())
        wait_until(self._is_ready, what="Prometheus is ready")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stop(timeout_s=20)

    def get(self, path: str, **parameters: str | float) -> Any:
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=20) as answer:  # noqa: S310  (our own server)
            return json.load(answer)["data"]

    def value(self, expression: str) -> float | None:
        """Return the current value of the only series; None if there is none, or several."""
        rows = self.get("query", query=expression)["result"]
        return float(rows[0]["value"][1]) if len(rows) == 1 else None

    def history(self, expression: str, *, since: float, step_s: float = 1) -> list[dict[str, Any]]:
        """Return each series since then: {"metric": labels, "values": [[time, text], ...]}."""
        return list(self.get("query_range", query=expression, start=since, end=time.time(), step=step_s)["result"])

    def firing_alerts(self) -> set[str]:
        return {alert["labels"]["alertname"] for alert in self.get("alerts")["alerts"] if alert["state"] == "firing"}

    def wait_for_alerts(self, *names: str) -> None:
        """Wait until each of them has fired once."""
        missing = set(names)

        def have_fired() -> bool:
            missing.difference_update(self.firing_alerts())
            return not missing

        wait_until(have_fired, what=f"{names} have fired; missing: {missing}")

    def wait_until_resolved(self, *names: str) -> None:
        wait_until(lambda: not set(names) & self.firing_alerts(), what=f"{names} are resolved")

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=2) as answer:  # noqa: S310  (as above)
                return bool(answer.status == 200)
        except OSError:
            return False


def _shorten(minutes: str) -> str:
    return f"{int(minutes.removesuffix('m')) * 60_000 // SPEEDUP}ms"
