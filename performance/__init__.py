"""What makes a step faster or smaller."""
