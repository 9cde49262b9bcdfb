"""What `msa demo` works on: documents and questions that ship with the package."""
