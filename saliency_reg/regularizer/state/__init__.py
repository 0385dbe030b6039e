"""What outlives a call: whether a state belongs to these tasks (``saved_state``), a state of other tasks by their names
(``common_tasks``), and tasks that come and go (``changing_tasks``).
"""
