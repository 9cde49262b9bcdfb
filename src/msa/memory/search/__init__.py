"""Which documents are the top-k of one layer."""
