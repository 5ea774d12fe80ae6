"""The command line `trl-selfplay`: one module per command, and the recipes as commands."""
