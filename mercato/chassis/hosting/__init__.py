"""What a service is made of, and the process that hosts services."""
