"""Audits of generated images: which of them are copies (`replication`) and how good the rest are (`fidelity`).

Nothing here knows about the federation: images go in, numbers come out.
"""
