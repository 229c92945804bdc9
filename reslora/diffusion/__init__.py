"""Training text-to-image models: flags -> family -> dataset -> encoded dataset -> samples -> training -> results."""
