"""One choice at a time: what each factor of the method, the networks and the data changes in the gain over hard sharing."""
