"""Tables of running workers and of models."""

from __future__ import annotations

import json
from collections.abc import Mapping

from jobs.catalogue import PRESETS
from jobs.hub import describe_state
from jobs.ledger.fleet import Heartbeat
from producer.console.output import print_columns

_NUMBERS: Mapping[str, type[int] | type[float]] = {
    **dict.fromkeys(("batch_limit", "slots", "in_flight", "images", "waiting", "pid"), int),
    **dict.fromkeys(("rate", "idle_s"), float),
}


def print_workers(workers: Mapping[str, Heartbeat], *, as_json: bool) -> None:
    """`workers`: heartbeats by node name."""
    if as_json:
        for node, beat in workers.items():
            typed = {name: _NUMBERS.get(name, str)(value) for name, value in beat.items()}
            print(json.dumps({"node": node, **typed, "draining": beat["draining"] == "1"}))
        return
    rows = [["worker", "device", "dtype", "batch", "model", "revision", "in flight", "images", "a second", "state"]]
    for node, beat in workers.items():
        state = "draining" if beat["draining"] == "1" else "serving"
        serving = [beat["hardware"], beat["dtype"], beat["batch_limit"], beat["model"], beat["revision"][:12]]
        rows.append([node, *serving, f"{beat['in_flight']} of {beat['slots']}", beat["images"], beat["rate"], state])
    print_columns(rows)


def print_models(*, as_json: bool) -> None:
    rows = [["model", "licence", "input", "million weights", "on this machine"]]
    for preset in PRESETS.values():
        height, width = preset.input_size
        state = describe_state(preset)
        if as_json:
            fields = {"name": preset.name, "licence": preset.licence, "input_size": preset.input_size, "state": state}
            print(json.dumps({**fields, "parameters_m": preset.parameters_m, "repository": preset.repository}))
        rows.append([preset.name, preset.licence, f"{height} x {width}", f"{preset.parameters_m:.1f}", state])
    if not as_json:
        print_columns(rows)
