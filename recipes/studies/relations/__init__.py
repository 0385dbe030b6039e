"""Which labels belong together: from trainings (``cells``) over what they say (``chance``, ``findings``) to a page."""
