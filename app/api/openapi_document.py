"""The committed OpenAPI document: `python -m app.api.openapi_document --write`, or `--check` that it is up to date."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from pathlib import Path

DOCUMENT_PATH = Path("openapi/openapi.json")
_DIFF_LINES_MAX = 40


def render() -> str:
    """The document of an app with default settings, as it is committed: sorted by path, one value a line."""
    from app.api.application import create_app
    from app.settings import Settings

    document = create_app(Settings()).openapi()
    document["paths"] = dict(sorted(document["paths"].items()))
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def check(path: Path) -> str | None:
    """What is wrong with the committed document, or None if it is as the code says."""
    if not path.exists():
        return f"{path} is missing: run `make openapi` and commit it"
    committed, current = path.read_text(), render()
    if committed == current:
        return None
    diff = difflib.unified_diff(committed.splitlines(), current.splitlines(), str(path), "the code", lineterm="", n=2)
    shown = "\n".join(list(diff)[:_DIFF_LINES_MAX])
    return f"{shown}\n{path} differs from the code: run `make openapi`, look at the change and commit it"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m app.api.openapi_document", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help=f"write {DOCUMENT_PATH}")
    action.add_argument("--check", action="store_true", help="exit 1 if it differs from the code")
    if parser.parse_args().write:
        DOCUMENT_PATH.parent.mkdir(exist_ok=True)
        DOCUMENT_PATH.write_text(render())
        return 0
    fault = check(DOCUMENT_PATH)
    if fault:
        sys.stderr.write(fault + "\n")
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
