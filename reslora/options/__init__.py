"""One typed table of options, and everything that is derived from it. Importing it takes no heavy library."""
