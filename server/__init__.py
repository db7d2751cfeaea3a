"""The ServerApp (app.py)."""

import ret_fl.diffusion  # noqa: F401  before the app: see there
