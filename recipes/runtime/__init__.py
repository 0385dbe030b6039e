"""The program around a training: processes, termination, files, folders of runs, tables and figures."""
