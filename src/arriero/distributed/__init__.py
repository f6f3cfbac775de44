"""Several processes: how they are started, and how a model is spread over them."""
