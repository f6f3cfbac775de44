"""From text to token files to batches: tokenizer, formats, prepare, indexed files, order."""
