"""The layout of the tests: what importing them loads."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.environment import ROOT

HEAVY = {"moto", "torch", "PIL", "numpy", "cv2", "onnx", "playwright"}
EXEMPT = {"tests.support.icc_profiles", "tests.support.u2netp_graph"}
"""They compute with numpy and torch; only the tests of colours and of ONNX import them."""
SERVER_FIXTURES = {
    "stack",
    "fleet",
    "aws",
    "ledger",
    "own_ledger",
    "store",
    "places",
    "receiver",
    "cutfleet",
    "browser",
}
LOADS = """
import importlib, json, sys
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps(sorted(sys.modules)))
"""


def names_in(folder: str) -> list[str]:
    paths = sorted((ROOT / folder).rglob("*.py"))
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths if path.stem != "__init__"]


def loaded_by(names: list[str]) -> set[str]:
    """Return the top-level packages that a fresh interpreter has loaded after importing the modules."""
    command = [sys.executable, "-c", LOADS, json.dumps(names)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return {name.partition(".")[0] for name in json.loads(ran.stdout)}


def test_what_tests_share_loads_no_heavy_package() -> None:
    names = [name for name in names_in("tests/support") if name not in EXEMPT]

    assert not loaded_by([*names, "tests.conftest"]) & HEAVY


def test_unit_tests_do_not_load_torch() -> None:
    assert "torch" not in loaded_by(names_in("tests/unit"))


@pytest.mark.parametrize("path", sorted((ROOT / "tests/unit").glob("*.py")), ids=lambda path: path.stem)
def test_unit_tests_use_no_fixture_that_starts_a_server(path: Path) -> None:
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    own = {function.name for function in functions}
    used = {argument.arg for function in functions if is_test_or_fixture(function) for argument in function.args.args}

    assert not (used - own) & SERVER_FIXTURES


def is_test_or_fixture(function: ast.FunctionDef) -> bool:
    return function.name.startswith("test_") or any("fixture" in ast.unparse(mark) for mark in function.decorator_list)
