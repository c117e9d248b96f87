"""`python -m app.cli` is `hotspare`, for where the command was not installed."""

from __future__ import annotations

from app.cli.main import main

main()
