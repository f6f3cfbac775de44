"""The LLaMA model as plain math: config, modules, initial weights, operators. Knows nothing of processes."""
