"""Which tasks belong together, and models that split along it: ``views`` (what was found), ``report`` (gathers them during a
training), ``groups`` (of tasks), ``branching`` and ``selective_sharing`` (models that follow)."""
