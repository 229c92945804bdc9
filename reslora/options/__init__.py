"""The typed table of options and everything derived from it. Importing it imports no heavy library."""
