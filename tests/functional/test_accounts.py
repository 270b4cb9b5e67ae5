"""Sources at one store, as one account; results at another, as another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.ledger import Ledger
from jobs.s3.client import Location, Store
from producer.demo.local_stack import LocalStack
from tests.support.environment import Run
from tests.support.factories import Places, fetch, sample_image
from workers.models import load
from workers.models.registry import PACKAGED

PHOTOGRAPHERS = ("photographers", "who-know-another-secret")


@pytest.fixture
def theirs(tmp_path: Path, places: Places, monkeypatch: pytest.MonkeyPatch) -> Iterator[Places]:
    """A store of its own with the sources, and a profile that can read them; the bucket is not at ours."""
    with_source = Places(f"s3://photographs-{Location.parse(places.source).bucket}/", places.to)
    profile = tmp_path / "credentials"
    profile.write_text(
        f"[sources]\naws_access_key_id = {PHOTOGRAPHERS[0]}\naws_secret_access_key = {PHOTOGRAPHERS[1]}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))
    other = LocalStack(tmp_path / "other", keys=PHOTOGRAPHERS)
    other.start_s3()
    monkeypatch.setenv("OTHER_ENDPOINT", other.environment["CUTFLEET_S3_ENDPOINT"])
    try:
        with other.store() as store:
            store.create_bucket(Location.parse(with_source.source).bucket)
            for number in range(3):
                store.put(with_source.key(f"{number}.jpg"), sample_image(seed=number), content_type="image/jpeg")
            yield with_source
    finally:
        other.stop()


def test_sources_and_results_may_be_of_two_stores_and_accounts(
    fleet: LocalStack, cutfleet: Run, store: Store, ledger: Ledger, theirs: Places, tmp_path: Path
) -> None:
    weights = tmp_path / "two-stores.safetensors"
    weights.write_bytes(PACKAGED["u2netp"].read_bytes())
    model = load(str(weights)).served_name
    told = {"source_endpoint": os.environ["OTHER_ENDPOINT"], "source_profile": "sources"}
    env = {f"CUTFLEET_{name.upper()}": value for name, value in told.items()}
    worker = fleet.start_worker(device="cpu", model=str(weights), slots="2", **told)
    try:
        examined = cutfleet("doctor", "--source", theirs.source, "--to", theirs.to, env=env)
        ran = cutfleet("submit", theirs.source, "--to", theirs.to, "--model", model, "--wait", env=env)
    finally:
        worker.stop()

    assert ran.returncode == 0, ran.stderr
    job = ledger.job(ran.stdout.strip())
    assert (job.total, job.done) == (3, 3)
    assert fetch(store, theirs.cutout("2.jpg")).startswith(b"\x89PNG")
    assert f"sources at {told['source_endpoint']} as sources" in examined.stdout
    assert f"reads {theirs.source}0.jpg" in examined.stdout.replace("Reads", "reads")
    wrong = cutfleet("plan", theirs.source, env=env | {"CUTFLEET_SOURCE_PROFILE": "nobody"})
    ours = cutfleet("plan", theirs.source, env={"CUTFLEET_SOURCE_ENDPOINT": told["source_endpoint"]})
    away = cutfleet("plan", theirs.source, env=env | {"CUTFLEET_SOURCE_ENDPOINT": "http://127.0.0.1:9"})
    assert (wrong.returncode, ours.returncode, away.returncode) == (2, 4, 4)
    for refused in (wrong, ours):
        assert "CUTFLEET_SOURCE_PROFILE" in refused.stderr
    assert "CUTFLEET_SOURCE_ENDPOINT" in away.stderr
