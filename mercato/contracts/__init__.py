"""What each service offers: one file a service, and what several of them share."""
