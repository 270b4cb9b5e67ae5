"""Fetch presets from a hub: a small hub on this machine and the real client."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jobs.catalogue import PRESETS, find_preset
from jobs.errors import ModelError
from jobs.hub import PINS_NAME, describe_state, find_cached, pull

FIRST, SECOND = "a" * 40, "b" * 40
FILES = {"config.json": b"{}", "model.safetensors": b"weights", "birefnet.py": b"raise SystemExit('never fetched')"}
PRESET = PRESETS["birefnet"]
NOWHERE = "http://127.0.0.1:9"


class Hub(ThreadingHTTPServer):
    """`revision`: of the main branch. `refusal`: status and error code of every response, if set."""

    revision = FIRST
    refusal: tuple[int, str] | None = None
    files: dict[str, bytes] = FILES
    fetched: list[str]


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def log_message(self, *args: object) -> None:
        return

    def _answer(self, *, send_body: bool) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        if hub.refusal:
            self._send(hub.refusal[0], b"{}", {"X-Error-Code": hub.refusal[1]}, send_body=send_body)
        elif path.startswith("/api/models/"):
            revision = next((known for known in (FIRST, SECOND) if known in path), hub.revision)
            tree = [
                {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}  # noqa: S324
                for name, body in hub.files.items()
            ]
            info = {"id": PRESET.repository, "sha": revision, "siblings": [{"rfilename": name} for name in hub.files]}
            self._send(200, json.dumps(tree if "/tree/" in path else info).encode(), {}, send_body=send_body)
        else:
            name = path.rpartition("/")[2]
            body = hub.files[name]
            hub.fetched.append(name)
            revision = next(known for known in (FIRST, SECOND) if known in path)
            headers = {"X-Repo-Commit": revision, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
            self._send(200, body, headers, send_body=send_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, send_body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if send_body:
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub(("127.0.0.1", 0), _Answers)
    server.fetched = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def address(hub: Hub) -> str:
    return f"http://127.0.0.1:{hub.server_address[1]}"


def test_a_pull_fetches_no_code_and_pins_the_revision(hub: Hub, tmp_path: Path) -> None:
    before = describe_state(PRESET, cache=tmp_path)

    folder = pull(PRESET, cache=tmp_path, endpoint=address(hub))

    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert set(hub.fetched) == {"config.json", "model.safetensors"}
    assert json.loads((tmp_path / PINS_NAME).read_text()) == {"birefnet": FIRST}
    assert (before, describe_state(PRESET, cache=tmp_path)) == ("not pulled", f"ready ({FIRST[:12]})")


def test_a_pinned_revision_stays_when_the_repository_changes(hub: Hub, tmp_path: Path) -> None:
    first = pull(PRESET, cache=tmp_path, endpoint=address(hub))
    hub.revision = SECOND

    again = pull(PRESET, cache=tmp_path, endpoint=address(hub))

    assert again == first == find_cached(PRESET, cache=tmp_path)


def test_a_given_revision_is_fetched_and_pinned(hub: Hub, tmp_path: Path) -> None:
    pull(PRESET, cache=tmp_path, endpoint=address(hub))

    folder = pull(PRESET, revision=SECOND, cache=tmp_path, endpoint=address(hub))

    assert folder.name == SECOND
    assert find_cached(PRESET, cache=tmp_path) == folder
    assert find_cached(PRESET, revision=FIRST, cache=tmp_path) == folder.with_name(FIRST)


@pytest.mark.parametrize("revision", ["main", "v1.0", FIRST[:12]])
def test_a_branch_a_tag_or_a_short_revision_is_refused(revision: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="40 digits") as caught:
        pull(PRESET, revision=revision, cache=tmp_path, endpoint=NOWHERE)

    assert caught.value.code == "revision_unclear"


def test_cached_files_need_no_hub(hub: Hub, tmp_path: Path) -> None:
    folder = pull(PRESET, cache=tmp_path, endpoint=address(hub))

    assert pull(PRESET, cache=tmp_path, endpoint=NOWHERE) == folder


def test_offline_without_cached_files_names_the_command_to_run(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cutfleet models pull") as caught:
        pull(PRESET, cache=tmp_path, endpoint=NOWHERE)

    assert caught.value.code == "model_offline"


def test_a_worker_in_offline_mode_raises_the_same_error(tmp_path: Path) -> None:
    ran = run(tmp_path, "-c", "from workers.models import load; load('birefnet')", HF_HUB_OFFLINE="1")

    assert ran.returncode == 1
    assert "jobs.errors.ModelError: The files of ZhengPeng7/BiRefNet are not on this machine" in ran.stderr


def test_the_command_lists_the_presets_and_pulls_one(hub: Hub, tmp_path: Path) -> None:
    models = ("-m", "producer", "models")

    before = run(tmp_path, *models).stdout
    pulled = run(tmp_path, *models, "pull", "birefnet", HF_ENDPOINT=address(hub))
    after = [json.loads(line) for line in run(tmp_path, *models, "--json").stdout.splitlines()]
    again = run(tmp_path, *models, "pull", "birefnet", HF_HUB_OFFLINE="1")

    assert [line.split()[0] for line in before.splitlines()[1:]] == list(PRESETS)
    assert re.search(r"^rmbg-2\.0 +CC BY-NC 4\.0 +1024 x 1024 +220\.2 +not pulled$", before, re.MULTILINE)
    assert Path(pulled.stdout.strip()).name == FIRST, pulled.stderr
    assert {row["name"]: row["state"] for row in after}["birefnet"] == f"ready ({FIRST[:12]})"
    assert again.stdout == pulled.stdout


def test_the_command_prints_an_unknown_preset_in_one_sentence(tmp_path: Path) -> None:
    ran = run(tmp_path, "-m", "producer", "models", "pull", "birefnet-huge")

    assert ran.returncode == 2
    assert ran.stderr.startswith("cutfleet: There is no model preset 'birefnet-huge'")
    assert ran.stderr.count("\n") == 1


def run(cache: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "HF_HUB_CACHE": str(cache), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_gated_repository_requires_a_token(hub: Hub, tmp_path: Path) -> None:
    hub.refusal = (403, "GatedRepo")

    with pytest.raises(ModelError, match="HF_TOKEN") as caught:
        pull(PRESETS["rmbg-2.0"], cache=tmp_path, endpoint=address(hub))

    assert caught.value.code == "model_missing"


def test_a_missing_repository_and_missing_weights_are_model_errors(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"config.json": b"{}"}
    with pytest.raises(ModelError, match=r"has no model\.safetensors") as caught:
        pull(PRESET, cache=tmp_path, endpoint=address(hub))
    hub.refusal = (404, "RepoNotFound")
    with pytest.raises(ModelError, match=r"has no ZhengPeng7/BiRefNet at main") as gone:
        pull(PRESET, cache=tmp_path / "other", endpoint=address(hub))

    assert caught.value.code == gone.value.code == "model_missing"
    assert not (tmp_path / PINS_NAME).exists()


def test_a_preset_without_a_repository_needs_a_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="CUTFLEET_MODEL") as caught:
        pull(PRESETS["u2net"], cache=tmp_path)

    assert caught.value.code == "model_missing"
    assert describe_state(PRESETS["u2net"], cache=tmp_path) == "bring a file"
    assert describe_state(PRESETS["u2netp"], cache=tmp_path) == "built in"


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ModelError, match="birefnet-portrait"):
        find_preset("birefnet-huge")
