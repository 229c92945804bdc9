"""Training methods: their registry, how adapters are configured and attached, and control methods for shortcuts."""
