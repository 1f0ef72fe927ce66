"""What a task adds to the latents, and to the finished picture."""
