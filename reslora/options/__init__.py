"""The typed table of options and everything derived from it. Importing this package imports no heavy library."""
