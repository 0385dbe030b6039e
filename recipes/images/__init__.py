"""Image data of the recipes: CIFAR-10, CelebA, and folders of images."""
