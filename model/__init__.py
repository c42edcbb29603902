"""SDXL: loading, text, VAE, U-Net, the objective. Importing this package prepares the process for diffusers and xFormers."""

from model.environment import prepare

prepare()
