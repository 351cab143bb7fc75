"""What is run the day a GPU is at hand: see docs/gpu_proof.md."""
