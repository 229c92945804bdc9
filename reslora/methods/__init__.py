"""Methods by name, how they are configured and attached, and the controls of shortcuts."""
