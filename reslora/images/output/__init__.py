"""The output of a run: samples, log, exports, figures, uploads."""
