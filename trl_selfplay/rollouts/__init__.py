"""From dataset rows to graded completions and the rows that a parent trains on."""
