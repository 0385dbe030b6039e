"""Single runs: command lines, and what is the same from there to results, tables and pictures."""
