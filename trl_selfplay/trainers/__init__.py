"""The trainers, a folder per method; beside them what they share."""
