"""What a run shows and leaves: samples, log, exports, figures."""
