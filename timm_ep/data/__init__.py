"""Images: where they are found, how they become tensors, in what order."""
