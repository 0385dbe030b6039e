"""The synthetic comparison of the paper: linear tasks, some of them in closed form."""
