"""The trainers and their configs; import them from `trl_selfplay`."""
