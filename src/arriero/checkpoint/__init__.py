"""The training state on disk: safetensors and JSON, a manifest, a commit marker, any layout back."""
