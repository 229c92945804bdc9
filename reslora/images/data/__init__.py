"""Find images and captions, encode them once, and turn them into training samples."""
