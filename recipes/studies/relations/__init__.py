"""Which labels belong together: from trainings (``cells``) over what they say (``chance``, ``grouping``, ``findings``) to a
page (``report``)."""
