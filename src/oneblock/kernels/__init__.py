"""Fast forms of the model's parts: CPU kernels and the modules that use them, compiled steps."""
