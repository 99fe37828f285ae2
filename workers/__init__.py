"""Touches machines and bytes; decides nothing; knows no database (DESIGN: arrows point down only)."""
