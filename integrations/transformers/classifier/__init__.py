"""The regularizer on the classifier of an unmodified model of transformers."""
