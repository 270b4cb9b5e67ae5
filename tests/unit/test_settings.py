"""Settings: all invalid variables are reported at once, and no secret is shown."""

from __future__ import annotations

import os

import pytest

from jobs.errors import SettingsError
from jobs.settings import PREFIX, load_settings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)


def test_all_invalid_variables_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTFLEET_DEVICE", "tpu")
    monkeypatch.setenv("CUTFLEET_MAX_TRIES", "none")
    monkeypatch.setenv("CUTFLEET_REDIS_ULR", "redis://x")

    with pytest.raises(SettingsError) as caught:
        load_settings()

    for name in ("CUTFLEET_DEVICE", "CUTFLEET_MAX_TRIES", "CUTFLEET_REDIS_ULR"):
        assert name in str(caught.value)


def test_a_password_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTFLEET_REDIS_URL", "rediss://fleet:open-sesame@redis.internal:6380/0")
    settings = load_settings()
    monkeypatch.setenv("CUTFLEET_REDIS_URL", "http://fleet:open-sesame@redis.internal")
    with pytest.raises(SettingsError) as caught:
        load_settings()

    shown = f"{settings!r} {settings} {settings.redis_name} {caught.value}"
    assert "open-sesame" not in shown
    assert "redis.internal:6380" in settings.redis_name
