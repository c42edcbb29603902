"""What a LoRA learned, measured: validation, tells, the verdict, and the page that shows it."""
