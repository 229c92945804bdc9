"""Code shared by the scripts and the application that is not part of the core."""
