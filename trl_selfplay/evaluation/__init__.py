"""How good is the model after each round: held-out prompts, diversity, warnings, reports."""
