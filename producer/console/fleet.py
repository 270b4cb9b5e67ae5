"""What can be asked of the fleet without asking for a job: which workers are alive, which models there are."""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping

from jobs.catalogue import PRESETS, RENDER, describe_state
from producer.console.output import print_columns

_NUMBERS: Mapping[str, type[int] | type[float]] = {
    **dict.fromkeys(("batch_limit", "slots", "in_flight", "images", "waiting", "pid"), int),
    **dict.fromkeys(("rate", "idle_s"), float),
}


def count_served(workers: Mapping[str, Mapping[str, str]]) -> collections.Counter[str]:
    """How many workers take images for each model; one on a CPU also makes renditions again."""
    served = collections.Counter(facts["model"] for facts in workers.values())
    return served + collections.Counter({RENDER: sum(facts.get("renders") == "1" for facts in workers.values())})


def show_workers(workers: Mapping[str, Mapping[str, str]], *, as_json: bool) -> None:
    """`workers`: what each says of itself, by node name, as text."""
    if as_json:
        for node, facts in workers.items():
            typed = {name: _NUMBERS.get(name, str)(value) for name, value in facts.items()}
            print(json.dumps({"node": node, **typed, "draining": facts["draining"] == "1"}))
        return
    rows = [["worker", "device", "dtype", "batch", "model", "revision", "in flight", "images", "a second", "state"]]
    for node, facts in workers.items():
        state = "draining" if facts["draining"] == "1" else "serving"
        held = f"{facts['in_flight']} of {facts['slots']}"
        what = [facts["hardware"], facts["dtype"], facts["batch_limit"], facts["model"], facts["revision"][:12]]
        rows.append([node, *what, held, facts["images"], facts["rate"], state])
    print_columns(rows)


def show_models(*, as_json: bool) -> None:
    rows = [["model", "licence", "input", "million weights", "on this machine"]]
    for preset in PRESETS.values():
        height, width = preset.input_size
        state = describe_state(preset)
        if as_json:
            facts = {"name": preset.name, "licence": preset.licence, "input_size": preset.input_size, "state": state}
            print(json.dumps({**facts, "parameters_m": preset.parameters_m, "repository": preset.repository}))
        rows.append([preset.name, preset.licence, f"{height} x {width}", f"{preset.parameters_m:.1f}", state])
    if not as_json:
        print_columns(rows)
