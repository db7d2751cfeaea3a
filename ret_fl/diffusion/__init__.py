"""The diffusion model itself, from diffusers' parts: models, the training objective, sampling."""
