"""The errors that a user can do something about. The command line prints them as one line and exits with 1."""

from __future__ import annotations


class DistZO2Error(Exception):
    """Base of every expected error: bad input, too little memory, a device that is not there. Messages are one line."""


class UsageError(DistZO2Error):
    """The options do not go together, or one is out of range. The command line exits with 2."""


class DataError(DistZO2Error):
    """A data file cannot be used; the message names file, line number and reason."""
