"""The house as drawn: which side may import what, and what only one module may touch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PIXELS = {"torch", "torchvision", "numpy", "PIL", "cv2", "simplejpeg", "isal", "transformers", "kornia", "pillow_heif"}
ALLOWED = {"jobs": {"jobs"}, "producer": {"producer", "jobs"}, "workers": {"workers", "jobs"}}
ORDER = [
    *("errors", "allowlist", "settings", "liveness", "logs", "metrics", "message", "recipe", "catalogue", "job"),
    *("preview", "s3", "sqs", "ledger", "broker"),
]


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_one_way(package: str) -> None:
    for path in modules(package):
        ours = {name.split(".")[0] for name in imports_of(path)} & set(ALLOWED)

        assert ours <= ALLOWED[package], f"{path} imports {ours - ALLOWED[package]}"


@pytest.mark.parametrize("package", ["jobs", "producer"])
def test_pixels_are_the_workers_business(package: str) -> None:
    for path in modules(package):
        heavy = {name.split(".")[0] for name in imports_of(path)} & PIXELS

        assert not heavy, f"{path} imports {heavy}"


@pytest.mark.parametrize(
    ("library", "owners"),
    [
        ("boto3", {"jobs/s3/client.py", "jobs/sqs.py"}),  # S3 and SQS are two services, each with errors of its own
        ("botocore", {"jobs/s3/client.py", "jobs/sqs.py"}),
        ("redis", {"jobs/ledger/connection.py", "jobs/ledger/__init__.py", "workers/process/kombu_patches.py"}),
    ],
)
def test_a_library_has_one_owner(library: str, owners: set[str]) -> None:
    users = {
        str(path.relative_to(ROOT))
        for package in ALLOWED
        for path in modules(package)
        if library in {name.split(".")[0] for name in imports_of(path)}
    }

    assert users <= owners


def test_inside_jobs_each_module_imports_only_those_before_it() -> None:
    for path in modules("jobs"):
        name = (*path.relative_to(ROOT / "jobs").with_suffix("").parts, "")[0]
        if name == "__init__":
            continue
        used = {name.split(".")[1] for name in imports_of(path) if name.startswith("jobs.")} - {name}

        assert name in ORDER, f"{name} has no place in the order"
        assert used <= set(ORDER[: ORDER.index(name)]), f"{path} imports {used}"


def test_only_settings_read_the_environment() -> None:
    readers = {
        str(path.relative_to(ROOT))
        for package in ALLOWED
        for path in modules(package)
        if "os.environ" in path.read_text() or "getenv" in path.read_text()
    }

    # local.py hands its environment on to what it starts; __main__ pins the GPU by writing one variable.
    assert readers == {"jobs/settings.py", "producer/demo/local_stack.py", "workers/__main__.py"}


def test_the_command_loads_nothing_heavy() -> None:
    heavy = PIXELS | {"boto3", "celery", "pydantic", "rich", "prometheus_client"}
    program = f"import sys, producer.cli.main; print(sorted({heavy!r} & set(sys.modules)))"

    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)

    assert shown.stdout.strip() == "[]"


def test_a_worker_loads_the_compiler_only_for_the_models_that_need_it() -> None:
    heavy = {"torchvision", "torch._dynamo", "transformers", "kornia", "onnxruntime"}
    modules = "workers.tasks.task, workers.process.kombu_patches, workers.models"
    program = f"import sys, {modules}; print(sorted({heavy!r} & set(sys.modules)))"

    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)

    assert shown.stdout.strip() == "[]"


def test_importing_the_workers_does_no_work() -> None:
    """No thread, no connection, no weights read: what imports a module gets definitions and nothing else."""
    paths = (path.relative_to(ROOT).with_suffix("") for path in modules("workers") if "transformers" not in path.stem)
    names = ", ".join(".".join(path.parts) for path in paths if path.stem not in ("__init__", "onnx"))
    program = f"""
import sys, threading
done = []
def look(event, args):
    weights = event == "open" and str(args[0]).endswith((".safetensors", ".onnx"))
    if weights or event == "socket.connect":
        done.append((event, str(args[0])))
sys.addaudithook(look)
import {names}, workers.models.onnx
print(done + [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()])
"""

    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)

    assert shown.stdout.strip() == "[]"
