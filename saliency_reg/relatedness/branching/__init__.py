"""Lu et al. (CVPR 2017): a network that splits, from the top down, along the affinity of its tasks."""
