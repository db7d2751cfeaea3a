"""A worker: the process of a SuperNode that stays between orders, since Flower starts a new client for every one.

Loading torch and diffusers, building the model, a CUDA context and compiling are done once, not for each order. The
client process (calls.py) finds the worker by a Unix socket or starts it (__main__.py), and hands it Flower's message
over that socket (frames.py). A worker belongs to one SuperNode and one run, and ends with either.
"""
