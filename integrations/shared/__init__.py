"""What several integrations share; it imports none of them, nor any optional package before it is needed."""
