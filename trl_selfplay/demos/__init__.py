"""The tasks, models and flags of the recipes."""
