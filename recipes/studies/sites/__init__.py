"""Few kinds of tasks at many sites: methods, trainings and tables."""
