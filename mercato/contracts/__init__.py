"""What each service offers: one file a service."""
