"""What lies on disk: segments, catalog, manifest. Imports nothing else of `memory`."""
