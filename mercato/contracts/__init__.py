"""The contracts of the services: one file a service, and files that several of them share."""
