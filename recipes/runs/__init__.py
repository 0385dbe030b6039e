"""Single trainings, from the command line to files, tables and pictures."""
