"""What is done to checkpoints, one module for each part of them."""
