"""Steps timed in pairs, collectives counted, memory measured, within one run."""
