"""Prometheus as `infra/monitoring` sets it up, watching processes of this machine, with its times shortened."""

from __future__ import annotations

import copy
import json
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from producer.demo.local_stack import Process, free_port, inherited_environment
from tests.support.factories import program, wait_until

MONITORING = Path(__file__).resolve().parents[2] / "infra/monitoring"
CONFIG: dict[str, Any] = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
RULES: dict[str, Any] = yaml.safe_load((MONITORING / "rules.yml").read_text())
DASHBOARD: dict[str, Any] = json.loads((MONITORING / "grafana/dashboards/cutfleet.json").read_text())
SHORTER = 100
"""What takes the rules a hundred seconds takes a test one."""
SCRAPE_S = 0.5


def rules() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def shortened() -> dict[str, Any]:
    """The rules with each duration in them (`for`, windows, a wait in seconds) by `SHORTER` shorter."""
    document = copy.deepcopy(RULES)
    for rule in (rule for group in document["groups"] for rule in group["rules"]):
        rule["expr"] = re.sub(r"\[(\d+m)\]", lambda found: f"[{_shorter(found[1])}]", rule["expr"])
        rule["expr"] = re.sub(
            r"(_oldest_seconds\S+ > )(\d+)$", lambda found: f"{found[1]}{int(found[2]) / SHORTER}", rule["expr"]
        )
        if "for" in rule:
            rule["for"] = _shorter(rule["for"])
    return document


def expressions(*, window: str, gpu_hour: float = 1) -> list[tuple[str, str]]:
    """Panel and expression of everything the dashboard asks, as Grafana fills it in."""
    filled = []
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            expr = target["expr"].replace("$__rate_interval", window).replace("$gpu_hour", str(gpu_hour))
            filled.append((panel["title"], expr))
    return filled


class Prometheus:
    """A server for the block, which looks at the ports of 127.0.0.1 that are given."""

    def __init__(self, folder: Path, ports: Sequence[int]) -> None:
        config = copy.deepcopy(CONFIG)
        config["global"] = {name: f"{int(SCRAPE_S * 1000)}ms" for name in config["global"]}
        config["global"]["scrape_timeout"] = config["global"]["scrape_interval"]
        (job,) = config["scrape_configs"]
        del job["dns_sd_configs"], job["relabel_configs"]
        job["static_configs"] = [{"targets": [f"127.0.0.1:{port}" for port in ports]}]
        folder.mkdir(parents=True)
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (folder / "rules.yml").write_text(yaml.safe_dump(shortened()))
        self._folder = folder
        self._url = f"http://127.0.0.1:{free_port()}"

    def __enter__(self) -> Self:
        command = [
            program("prometheus"),
            f"--config.file={self._folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self._folder / 'data'}",
            f"--web.listen-address={self._url.removeprefix('http://')}",
        ]
        self._process = Process(command, log=self._folder / "log", env=inherited_environment())
        wait_until(self._is_ready, what="Prometheus is ready")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.stop(timeout_s=20)

    def ask(self, path: str, **parameters: str | float) -> Any:
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=20) as answer:  # noqa: S310  (our own server)
            return json.load(answer)["data"]

    def value(self, expression: str) -> float | None:
        """Of the one series that there is now."""
        rows = self.ask("query", query=expression)["result"]
        return float(rows[0]["value"][1]) if len(rows) == 1 else None

    def history(self, expression: str, *, since: float, step_s: float = 1) -> list[dict[str, Any]]:
        """Each series since then: {"metric": labels, "values": [[time, text], ...]}."""
        return list(self.ask("query_range", query=expression, start=since, end=time.time(), step=step_s)["result"])

    def alarms(self) -> set[str]:
        """Names of the alerts that fire now."""
        return {alert["labels"]["alertname"] for alert in self.ask("alerts")["alerts"] if alert["state"] == "firing"}

    def wait_for_alarm(self, *names: str) -> None:
        """Until each has fired, be it one after the other."""
        missing = set(names)

        def have_fired() -> bool:
            missing.difference_update(self.alarms())
            return not missing

        wait_until(have_fired, what=f"{names} fire; {self.alarms()} do")

    def wait_for_calm(self, *names: str) -> None:
        wait_until(lambda: not set(names) & self.alarms(), what=f"{names} are over")

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=2) as answer:  # noqa: S310  (as above)
                return bool(answer.status == 200)
        except OSError:
            return False


def _shorter(minutes: str) -> str:
    return f"{int(minutes.removesuffix('m')) * 60_000 // SHORTER}ms"
