"""`python -m flopprof`: the command line."""

from __future__ import annotations

from flopprof.cli.main import main

main()
