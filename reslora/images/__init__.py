"""Train text-to-image models: options -> family -> data set -> encoded data set -> samples -> training -> results."""
