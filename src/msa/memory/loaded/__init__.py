"""A bank in memory, for asking: keys, content, snapshots, the memory plan."""
