"""Which of the two patch forms a BiRefNet checkpoint was trained with, decided by what stands beside it and never by a
guess: the wrong one loads without complaint and gives worse masks.
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
    """`patch_order` of `config`, else what `birefnet.py` in `directory` does, read and never run.

    Raises `ModelError` (`patch_order_unknown`) that says what to set.
    """
    if "patch_order" in config:
        return _stated(config["patch_order"], directory)
    code = directory / CODE_NAME
    forms = _forms_in(code.read_text("utf-8", errors="replace")) if code.is_file() else set()
    if len(forms) == 1:
        return forms.pop()
    seen = "which shows both or neither of them" if code.is_file() else "which is not there"
    raise ModelError(
        f"Nothing says how the model in {directory} cuts its input: config.json has no patch_order, and {CODE_NAME}, "
        f'{seen}, does not tell. Add to config.json "patch_order": "columns_first" (RMBG-2.0, BiRefNet code before '
        '2024-11-05) or "channels_first" (code since); the wrong one gives worse masks without an error.',
        code="patch_order_unknown",
    )


def _stated(value: object, directory: Path) -> PatchOrder:
    for order in get_args(PatchOrder):
        if value == order:
            return order  # type: ignore[no-any-return]  # get_args gives Any; it is one of the literals
    raise ModelError(
        f"patch_order in {directory / 'config.json'} is {value!r}; it must be {' or '.join(get_args(PatchOrder))}.",
        code="patch_order_unknown",
    )


def _forms_in(code: str) -> set[PatchOrder]:
    """`get_patches_batch` called, or `image2patches` called with `(c hg wg)`; comments and unused code do not count."""
    try:
        calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    except (SyntaxError, ValueError):
        return set()
    forms: set[PatchOrder] = set()
    for call in calls:
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        texts = [str(node.value) for node in ast.walk(call) if isinstance(node, ast.Constant)]
        if name == "get_patches_batch":
            forms.add("columns_first")
        if name == "image2patches" and any("(c hg wg)" in text for text in texts):
            forms.add("channels_first")
    return forms
