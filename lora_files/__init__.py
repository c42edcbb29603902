"""LoRA files, ours and other tools'."""
