"""What the scripts and the application share beside the core."""
