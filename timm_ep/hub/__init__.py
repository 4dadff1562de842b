"""What is shared: a run as a repository, its card, and the way to the Hugging Face Hub and back."""
