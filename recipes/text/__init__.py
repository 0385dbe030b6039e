"""What the recipes on texts share."""
