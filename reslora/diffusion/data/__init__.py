"""Images and captions: found, encoded once, and drawn into samples."""
