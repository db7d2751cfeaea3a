"""The ClientApp (app.py), and what it carries orders out with (training.py)."""
