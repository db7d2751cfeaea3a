"""The diffusion model itself, from diffusers' parts: models, the training objective, sampling."""

# Flower's simulation engine loads the ServerApp in one thread and the ClientApp in another. diffusers puts another
# module in its own place while it loads, so a thread that waits for the other's import finds it without its names.
# Both apps import this package first: whoever waits for it waits until diffusers is there
import diffusers as diffusers
