"""The loop over rounds, its folder on disk, and one training of the parent."""
