"""Selective Sharing (Strezoski et al., ICMR 2019), by our reading: tasks that come to share an estimator."""
