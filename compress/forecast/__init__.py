"""What a model will take, told from its config.json alone: nothing is loaded and torch isn't needed."""
