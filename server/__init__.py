"""Flower server side."""
