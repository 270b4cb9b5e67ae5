"""`cutfleet demo`, as a process."""

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
from tests.support.images import decode_image, sample_image
from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def demo(*args: str, out: Path) -> Iterator[subprocess.Popen[str]]:
    """Start the command in a process group of its own, as a shell does."""
    with subprocess.Popen(
        [sys.executable, "-m", "producer", "demo", *args, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=inherited_environment() | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores SIGINT
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def processes_of(folder: Path) -> list[str]:
    """Return the command lines of processes whose output is below `folder`."""
    command_lines = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            output = os.readlink(f"/proc/{pid}/fd/1")
            if str(folder) in output:
                command_lines.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return command_lines


def test_a_folder_of_images_gives_cutouts_masks_and_a_contact_sheet(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(sample_image(seed=1))
    (photos / "a.png").write_bytes(sample_image(seed=2, form="PNG"))
    (photos / "notes.txt").write_text("no image")

    with demo(str(photos), out=out) as process:
        output, _ = process.communicate(timeout=100)

    assert process.returncode == 0, output
    for name in ("a.jpg", "a.png"):
        assert decode_image((out / "cutouts" / f"{name}.png").read_bytes()).mode == "RGBA"
        assert decode_image((out / "masks" / f"{name}.png").read_bytes()).mode == "L"
    assert decode_image((out / "contact-sheet.png").read_bytes()).height > 600
    assert "2 done" in output and "contact-sheet.png" in output
    assert not processes_of(out)


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    (photos / "good.jpg").write_bytes(sample_image(seed=1))
    (photos / "page.jpg").write_bytes(b"<!DOCTYPE html><html></html>")

    with demo(str(photos), out=out) as process:
        output, _ = process.communicate(timeout=100)

    assert process.returncode == 1, output
    assert "page.jpg" in output and "[not_an_image]" in output
    assert not (out / "cutouts" / "page.jpg.png").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_demo_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    with demo(out=out) as process:
        wait_until(lambda: len(processes_of(out)) >= 3, what="the servers and the dispatcher run")

        os.killpg(process.pid, number)
        process.communicate(timeout=100)

    assert process.returncode != 0
    assert not processes_of(out)


@pytest.mark.parametrize("at", [1, 2, 3, 4], ids=["broker", "store", "dispatcher", "worker"])
def test_a_signal_while_a_process_starts_ends_that_process_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The signal comes between the start of the child and the return of `Popen`."""
    started = []

    class InterruptedPopen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self.pid)
            if len(started) == at:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", InterruptedPopen)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with pytest.raises(SystemExit), LocalStack(tmp_path) as stack:
            stack.start_dispatcher()
            stack.start_worker(device="cpu")
    finally:
        signal.signal(signal.SIGTERM, before)

    assert len(started) == at
    assert not processes_of(tmp_path)
