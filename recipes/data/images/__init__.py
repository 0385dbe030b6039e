"""Images in memory, in files, and in columns of the hub."""
