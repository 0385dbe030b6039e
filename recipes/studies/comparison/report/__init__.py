"""What the report of many methods on one data set has beside that of any study: see :class:`options.Comparison`."""
