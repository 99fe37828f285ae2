"""Tests of what lives in guests."""
