"""From a captured forward to distances."""
