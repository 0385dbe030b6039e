"""Many small groups: a task for each, networks with the saliency penalty, and the models that are usual for such data."""
