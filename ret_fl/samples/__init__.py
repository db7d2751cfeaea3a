"""Samples where they are: a client gets those of its order from its own disk or from a sample service."""
