"""Flower client side."""
