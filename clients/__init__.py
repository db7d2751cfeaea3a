"""The ClientApp (app.py).

Flower starts a process for every order. What that loads stays to its end, so Python need not look for garbage in it:
neither while it loads (a quarter of the time) nor at the end (a second of a core).
"""

import gc

gc.disable()
try:
    import ret_fl.diffusion  # noqa: F401  before the app: see there
    from clients import app  # noqa: F401
finally:
    gc.enable()
gc.freeze()
