"""`cutfleet demo`, as a newcomer runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from producer.demo.local_stack import LocalStack, inherited_environment
from tests.support.factories import decode, sample_image, wait_until

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def demo(*args: str, out: Path) -> Iterator[subprocess.Popen[str]]:
    """The command in a process group of its own, as a shell starts it."""
    with subprocess.Popen(
        [sys.executable, "-m", "producer", "demo", *args, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=inherited_environment() | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where these tests run in background
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def processes_of(folder: Path) -> list[str]:
    """Command lines of what works on `folder`: its path stands in the servers' arguments or is where their log is."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            output = os.readlink(f"/proc/{pid}/fd/1")
            if str(folder) in output:
                found.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def test_own_images_come_out_as_cutouts_masks_and_one_sheet(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(sample_image(seed=1))
    (photos / "a.png").write_bytes(sample_image(seed=2, form="PNG"))
    (photos / "notes.txt").write_text("no image")

    with demo(str(photos), out=out) as process:
        said, _ = process.communicate(timeout=100)

    assert process.returncode == 0, said
    for name in ("a.jpg", "a.png"):
        assert decode((out / "cutouts" / f"{name}.png").read_bytes()).mode == "RGBA"
        assert decode((out / "masks" / f"{name}.png").read_bytes()).mode == "L"
    assert decode((out / "contact-sheet.png").read_bytes()).height > 600
    assert "2 done" in said and "contact-sheet.png" in said
    assert not processes_of(out)


def test_an_image_that_is_none_is_named(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    (photos / "good.jpg").write_bytes(sample_image(seed=1))
    (photos / "page.jpg").write_bytes(b"<!DOCTYPE html><html></html>")

    with demo(str(photos), out=out) as process:
        said, _ = process.communicate(timeout=100)

    assert process.returncode == 1, said
    assert "page.jpg" in said and "[not_an_image]" in said
    assert not (out / "cutouts" / "page.jpg.png").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_half_way_it_leaves_no_process_behind(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    with demo(out=out) as process:
        wait_until(lambda: len(processes_of(out)) >= 3, what="the servers and the dispatcher run")

        os.killpg(process.pid, number)
        process.communicate(timeout=100)

    assert process.returncode != 0
    assert not processes_of(out)


@pytest.mark.parametrize("at", [1, 2, 3, 4], ids=["broker", "store", "dispatcher", "worker"])
def test_told_to_go_while_a_process_starts_it_ends_that_one_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The signal comes when the child exists and whoever asked for it has not been told."""
    started = []

    class Told(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self.pid)
            if len(started) == at:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", Told)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with pytest.raises(SystemExit), LocalStack(tmp_path) as stack:
            stack.start_dispatcher()
            stack.start_worker(device="cpu")
    finally:
        signal.signal(signal.SIGTERM, before)

    assert len(started) == at
    assert not processes_of(tmp_path)
