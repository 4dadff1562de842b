"""From options to a trained model, and what is done with one."""
