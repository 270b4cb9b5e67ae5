"""Decide the patch order that a BiRefNet checkpoint was trained with from the files beside it. It is never guessed: the
wrong one loads without an error and gives worse masks.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from jobs.catalogue import PatchOrder
from jobs.errors import ModelError

CODE_NAME = "birefnet.py"


def decide_patch_order(directory: Path, config: Mapping[str, Any]) -> PatchOrder:
    """Return `patch_order` of `config`, else the order in `birefnet.py` of `directory`, which is parsed and never run.

    Raises `ModelError` (`patch_order_unknown`).
    """
    if "patch_order" in config:
        return _parse(config["patch_order"], directory)
    code = directory / CODE_NAME
    orders = _find_orders(code.read_text("utf-8", errors="replace")) if code.is_file() else set()
    if len(orders) == 1:
        return orders.pop()
    problem = f"{CODE_NAME} uses both orders or neither" if code.is_file() else f"there is no {CODE_NAME}"
    raise ModelError(
        f"The patch order of the model in {directory} is unknown: config.json has no patch_order, and {problem}. "
        'Add to config.json "patch_order": "columns_first" (RMBG-2.0, BiRefNet code before 2024-11-05) or '
        '"channels_first" (code since). The wrong one gives worse masks without an error.',
        code="patch_order_unknown",
    )


def _parse(value: object, directory: Path) -> PatchOrder:
    for order in get_args(PatchOrder):
        if value == order:
            return order  # type: ignore[no-any-return]  # get_args gives Any; it is one of the literals
    raise ModelError(
        f"patch_order in {directory / 'config.json'} is {value!r}; it must be {' or '.join(get_args(PatchOrder))}.",
        code="patch_order_unknown",
    )


def _find_orders(code: str) -> set[PatchOrder]:
    """Find calls of `get_patches_batch`, and calls of `image2patches` with `(c hg wg)`; comments do not count."""
    try:
        calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    except (SyntaxError, ValueError):
        return set()
    orders: set[PatchOrder] = set()
    for call in calls:
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        texts = [str(node.value) for node in ast.walk(call) if isinstance(node, ast.Constant)]
        if name == "get_patches_batch":
            orders.add("columns_first")
        if name == "image2patches" and any("(c hg wg)" in text for text in texts):
            orders.add("channels_first")
    return orders
