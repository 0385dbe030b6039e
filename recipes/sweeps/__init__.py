"""Every family of an integration, tried one by one in processes of their own."""
