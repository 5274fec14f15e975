"""Measurements of what was trained, each a script that prints a table."""
