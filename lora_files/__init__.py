"""LoRA files of this suite and of other tools."""
