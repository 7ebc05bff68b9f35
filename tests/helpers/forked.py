"""Processes forked from a server that has imported what they need."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import _forkserver

_imported: list[str] = []


def context(*modules: str) -> ForkServerContext:
    """Starts processes that have `modules` ready. A server without them, whose processes must have ended, makes place
    for one that has them too."""
    if missing := {"preloaded", *modules} - set(_imported):
        _forkserver._stop()
        _imported.extend(sorted(missing))
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(_imported)
    return found
