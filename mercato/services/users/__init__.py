"""The users service: accounts, credentials, sessions, roles."""
