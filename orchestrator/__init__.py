"""Decides and records; never touches a byte of a disk (DESIGN: arrows point down only)."""
