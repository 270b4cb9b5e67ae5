"""The layout of the product: which package may import which, and which module owns a library."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.environment import ROOT

PIXELS = {"torch", "torchvision", "numpy", "PIL", "cv2", "simplejpeg", "isal", "transformers", "kornia", "pillow_heif"}
SIDES = {"jobs": {"jobs"}, "producer": {"producer", "jobs"}, "workers": {"workers", "jobs"}}
JOBS_ORDER = [
    *("errors", "s3.location", "allowlist", "settings", "liveness", "logs", "metrics", "sliding_rate"),
    *("message", "recipe", "s3.names", "catalogue", "hub", "results", "job", "envelope", "preview"),
    *("s3.errors", "s3.client", "s3.listing", "sqs"),
    *("ledger.connection", "ledger.jobs", "ledger.images", "ledger.window", "ledger.dispatch", "ledger.outbox"),
    *("ledger.watches", "ledger.quotas", "ledger.fleet", "ledger", "broker"),
]
ALLOWED_IMPORTS = {
    "producer.records": set(),
    "producer.submission": {"producer.records"},
    "producer.dispatcher": {"producer.records"},
    "producer.audit": {"producer.records", "producer.submission"},
    "producer.webhooks": {"producer.records"},
    "producer.ingest": {"producer.records", "producer.submission"},
    "producer.api": {"producer.records", "producer.submission", "producer.webhooks"},
    "producer.doctor": {"producer.submission"},
    "producer.console": {"producer.submission", "producer.records"},
    "producer.review": {"producer.records", "producer.submission", "producer.console"},
    "producer.demo": {"producer.submission", "producer.console"},
    "workers.imaging": set(),
    "workers.models": {"workers.imaging"},
    "workers.process": {"workers.imaging", "workers.models"},
    "workers.tasks": {"workers.imaging", "workers.models", "workers.process"},
    "workers.tools": {"workers.imaging", "workers.models"},
}
"""Packages of its own side that a package may import. The commands (producer.cli, workers.serve) may import all."""
MAX_PUBLIC_METHODS = 30


def imports_of(path: Path) -> set[str]:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module)
    return imported


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", SIDES)
def test_imports_run_one_way(package: str) -> None:
    for path in modules(package):
        ours = {name.split(".")[0] for name in imports_of(path)} & set(SIDES)

        assert ours <= SIDES[package], f"{path} imports {ours - SIDES[package]}"


@pytest.mark.parametrize("package", ["jobs", "producer"])
def test_only_workers_import_image_libraries(package: str) -> None:
    for path in modules(package):
        heavy = {name.split(".")[0] for name in imports_of(path)} & PIXELS

        assert not heavy, f"{path} imports {heavy}"


@pytest.mark.parametrize(
    ("library", "owners"),
    [
        ("boto3", {"jobs/s3/client.py", "jobs/sqs.py"}),
        ("botocore", {"jobs/s3/client.py", "jobs/s3/errors.py", "jobs/sqs.py"}),
        ("redis", {"jobs/ledger/connection.py", "workers/process/kombu_patches.py"}),
    ],
)
def test_only_its_owners_import_a_library(library: str, owners: set[str]) -> None:
    users = {
        str(path.relative_to(ROOT))
        for package in SIDES
        for path in modules(package)
        if library in {name.split(".")[0] for name in imports_of(path)}
    }

    assert users <= owners


def name_of(path: Path) -> str:
    """Return the dotted name of a module; of an `__init__`, the package's."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_inside_jobs_each_module_imports_only_earlier_ones() -> None:
    for path in modules("jobs"):
        name = name_of(path).removeprefix("jobs").lstrip(".")
        if not path.read_text():
            continue
        used = {found.removeprefix("jobs.") for found in imports_of(path) if found.startswith("jobs.")}

        assert name in JOBS_ORDER, f"{name} is missing in JOBS_ORDER"
        assert used <= set(JOBS_ORDER[: JOBS_ORDER.index(name)]), f"{path} imports {used}"


@pytest.mark.parametrize("package", ALLOWED_IMPORTS)
def test_a_package_imports_only_allowed_packages(package: str) -> None:
    side = package.partition(".")[0]
    for path in modules(package.replace(".", "/")):
        ours = {".".join(name.split(".")[:2]) for name in imports_of(path) if name.startswith(f"{side}.")} - {package}

        assert ours <= ALLOWED_IMPORTS[package], f"{path} imports {ours - ALLOWED_IMPORTS[package]}"


@pytest.mark.parametrize("side", SIDES)
def test_no_modules_import_each_other_in_a_circle(side: str) -> None:
    graph = {name_of(path): {name for name in imports_of(path) if name.startswith(side)} for path in modules(side)}

    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("side", SIDES)
def test_no_class_has_too_many_public_methods(side: str) -> None:
    for path in modules(side):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
                public = [name for name in methods if not name.startswith("_")]
                assert len(public) <= MAX_PUBLIC_METHODS, f"{path}: {node.name} has {len(public)}"


def test_only_settings_read_the_environment() -> None:
    readers = {
        str(path.relative_to(ROOT))
        for package in SIDES
        for path in modules(package)
        if "os.environ" in path.read_text() or "getenv" in path.read_text()
    }

    # local_stack passes its environment on to its processes; the worker pins the GPU by writing one variable.
    assert readers == {"jobs/settings.py", "producer/demo/local_stack.py", "workers/__main__.py"}


def test_the_command_loads_no_heavy_package() -> None:
    heavy = PIXELS | {"boto3", "celery", "pydantic", "rich", "prometheus_client"}
    program = f"import sys, producer.cli.main; print(sorted({heavy!r} & set(sys.modules)))"

    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)

    assert ran.stdout.strip() == "[]"


def test_a_worker_loads_compiler_and_model_libraries_only_when_needed() -> None:
    heavy = {"torchvision", "torch._dynamo", "transformers", "kornia", "onnxruntime"}
    modules = "workers.tasks.task, workers.process.kombu_patches, workers.models"
    program = f"import sys, {modules}; print(sorted({heavy!r} & set(sys.modules)))"

    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)

    assert ran.stdout.strip() == "[]"


def test_importing_the_workers_has_no_side_effect() -> None:
    """No thread starts, no connection opens and no weights are read."""
    paths = (path.relative_to(ROOT).with_suffix("") for path in modules("workers") if "transformers" not in path.stem)
    names = ", ".join(".".join(path.parts) for path in paths if path.stem not in ("__init__", "onnx"))
    program = f"""
import sys, threading
effects = []
def record(event, args):
    weights = event == "open" and str(args[0]).endswith((".safetensors", ".onnx"))
    if weights or event == "socket.connect":
        effects.append((event, str(args[0])))
sys.addaudithook(record)
import {names}, workers.models.onnx
print(effects + [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()])
"""

    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)

    assert ran.stdout.strip() == "[]"
