"""Training text-to-image models: options -> family -> dataset -> encoded dataset -> samples -> training -> results."""
