"""What a training run will need and how fast it can be, computed from its config without data and without a GPU."""
