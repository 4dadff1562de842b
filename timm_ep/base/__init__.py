"""What knows nothing of nets: writing files, figures, memory."""
