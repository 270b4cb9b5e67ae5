"""Sources in one store and account, outputs in another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.ledger import Ledger
from jobs.s3.client import Store
from producer.demo.local_stack import LocalStack
from tests.support.environment import Run
from tests.support.images import sample_image
from tests.support.places import Places, fetch_output
from workers.models import load
from workers.models.model_files import PACKAGED

OTHER_KEYS = ("photographers", "another-secret")


@pytest.fixture
def two_stores(tmp_path: Path, places: Places, monkeypatch: pytest.MonkeyPatch) -> Iterator[Places]:
    """A second store with the sources, and an AWS profile that can read it. Our own store lacks the source bucket."""
    split = Places(f"s3://photographs-{places.source_location.bucket}/", places.to)
    profile = tmp_path / "credentials"
    profile.write_text(f"[sources]\naws_access_key_id = {OTHER_KEYS[0]}\naws_secret_access_key = {OTHER_KEYS[1]}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))
    other = LocalStack(tmp_path / "other", keys=OTHER_KEYS)
    other.start_s3()
    monkeypatch.setenv("OTHER_ENDPOINT", other.environment["CUTFLEET_S3_ENDPOINT"])
    try:
        with other.store() as store:
            store.create_bucket(split.source_location.bucket)
            for number in range(3):
                store.put(split.key(f"{number}.jpg"), sample_image(seed=number), content_type="image/jpeg")
            yield split
    finally:
        other.stop()


def test_sources_and_outputs_can_be_in_two_stores_and_accounts(
    fleet: LocalStack, cutfleet: Run, store: Store, ledger: Ledger, two_stores: Places, tmp_path: Path
) -> None:
    weights = tmp_path / "two-stores.safetensors"
    weights.write_bytes(PACKAGED["u2netp"].read_bytes())
    model = load(str(weights)).served_name
    source_settings = {"source_endpoint": os.environ["OTHER_ENDPOINT"], "source_profile": "sources"}
    env = {f"CUTFLEET_{name.upper()}": value for name, value in source_settings.items()}
    worker = fleet.start_worker(device="cpu", model=str(weights), slots="2", **source_settings)
    try:
        examined = cutfleet("doctor", "--source", two_stores.source, "--to", two_stores.to, env=env)
        ran = cutfleet("submit", two_stores.source, "--to", two_stores.to, "--model", model, "--wait", env=env)
    finally:
        worker.stop()

    assert ran.returncode == 0, ran.stderr
    job = ledger.jobs.get(ran.stdout.strip())
    assert (job.total, job.done) == (3, 3)
    assert fetch_output(store, two_stores.cutout("2.jpg")).startswith(b"\x89PNG")
    assert f"sources at {source_settings['source_endpoint']} as sources" in examined.stdout
    assert f"reads {two_stores.source}0.jpg" in examined.stdout.replace("Reads", "reads")
    wrong = cutfleet("plan", two_stores.source, env=env | {"CUTFLEET_SOURCE_PROFILE": "unknown"})
    ours = cutfleet("plan", two_stores.source, env={"CUTFLEET_SOURCE_ENDPOINT": source_settings["source_endpoint"]})
    away = cutfleet("plan", two_stores.source, env=env | {"CUTFLEET_SOURCE_ENDPOINT": "http://127.0.0.1:9"})
    assert (wrong.returncode, ours.returncode, away.returncode) == (2, 4, 4)
    for refused in (wrong, ours):
        assert "CUTFLEET_SOURCE_PROFILE" in refused.stderr
    assert "CUTFLEET_SOURCE_ENDPOINT" in away.stderr
