"""Captioned images, wherever they are, as samples."""
