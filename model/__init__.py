"""SDXL: loading, text, VAE, U-Net, the objective. Readies xFormers before diffusers is imported."""

from model.environment import prepare

prepare()
