"""How a model is spread over devices: a table per parallelism, applied from outside in a fixed order."""
