"""What lies on disk: files that are written whole, run folders, agents and autoencoders."""
