"""The faults of a campaign: each causes one fault, lets the campaign watch progress meanwhile, and ends it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

import redis

from tests.faults.s3_proxy import Fault
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from tests.faults.campaign import Campaign

FAULT_S = 3.0
"""Longer than a lease of the fleet."""


def kill_worker(campaign: Campaign) -> None:
    os.kill(campaign.choose_process(campaign.fleet.workers), signal.SIGKILL)


def freeze_and_kill_worker(campaign: Campaign) -> None:
    pid = campaign.choose_process(campaign.fleet.workers)
    os.kill(pid, signal.SIGSTOP)
    campaign.watch(campaign.random.uniform(0.2, FAULT_S))
    os.kill(pid, signal.SIGKILL)


def freeze_worker(campaign: Campaign) -> None:
    _freeze(campaign, campaign.choose_process(campaign.fleet.workers))


def stop_worker(campaign: Campaign) -> None:
    os.kill(campaign.choose_process(campaign.fleet.workers), signal.SIGTERM)


def kill_dispatcher(campaign: Campaign) -> None:
    os.kill(campaign.choose_process(campaign.fleet.dispatchers), signal.SIGKILL)


def freeze_dispatcher(campaign: Campaign) -> None:
    _freeze(campaign, campaign.choose_process(campaign.fleet.dispatchers))


def kill_submission(campaign: Campaign) -> None:
    """Kill a submission; then resume it, or submit again if it created no job."""
    places = campaign.new_places()
    pid = campaign.fleet.submissions.start_for(places)
    campaign.watch(campaign.random.uniform(0, 1.5))
    try:
        campaign.fleet.submissions.kill(pid)
    finally:
        campaign.jobs[campaign.submit(places)] = places


def pause_valkey(campaign: Campaign) -> None:
    with redis.Redis(port=campaign.fleet.stack.redis_port) as client:
        client.client_pause(int(1000 * FAULT_S))
    campaign.watch(FAULT_S)


def restart_valkey(campaign: Campaign) -> None:
    valkey = campaign.fleet.stack.valkey
    assert valkey is not None
    valkey.signal(campaign.random.choice([signal.SIGTERM, signal.SIGKILL]))
    wait_until(lambda: valkey.poll() is not None, what="Valkey has ended")
    valkey.kill()
    campaign.fleet.stack.start_valkey()


def reset_valkey_connections(campaign: Campaign) -> None:
    campaign.wire.cut()


def half_open_valkey_connections(campaign: Campaign) -> None:
    campaign.wire.swallow()
    campaign.watch(FAULT_S)
    campaign.wire.heal()


def _freeze(campaign: Campaign, pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    campaign.watch(FAULT_S)
    os.kill(pid, signal.SIGCONT)


def _cause_s3_fault(fault: Fault) -> Callable[[Campaign], None]:
    def cause(campaign: Campaign) -> None:
        with campaign.s3.fault(fault):
            campaign.watch(FAULT_S)

    return cause


FAULTS: dict[str, Callable[[Campaign], None]] = {
    "worker killed": kill_worker,
    "worker frozen, then killed": freeze_and_kill_worker,
    "worker frozen, then resumed": freeze_worker,
    "worker stopped with SIGTERM": stop_worker,
    "dispatcher killed": kill_dispatcher,
    "dispatcher frozen, then resumed": freeze_dispatcher,
    "producer killed": kill_submission,
    "Valkey restarted": restart_valkey,
    "Valkey paused": pause_valkey,
    "Valkey's connections reset": reset_valkey_connections,
    "Valkey's connections half-open": half_open_valkey_connections,
    "S3 away (503 for everything)": _cause_s3_fault(Fault("answer")),
    "S3 hangs, for half": _cause_s3_fault(Fault("hang", share=0.5)),
    "S3 SlowDown for 30%": _cause_s3_fault(Fault("answer", share=0.3)),
    "S3 resets in mid body": _cause_s3_fault(Fault("half", methods=("GET",), share=0.5)),
    "S3 loses the answer of a PUT": _cause_s3_fault(Fault("lose", methods=("PUT",), share=0.5)),
}
