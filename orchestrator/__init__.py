"""Decides and records; never touches a byte of a disk (DESIGN: arrows point down only)."""

import logging

# Lines are for processes that stay (`workers/logs.py`); a command says what it has to say by itself.
logging.getLogger(__name__).addHandler(logging.NullHandler())
