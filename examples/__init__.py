"""Plug-ins to start from: docs/extending.md shows each, and `python -m examples.policy` tries one out."""
