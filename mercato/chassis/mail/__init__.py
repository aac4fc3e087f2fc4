"""E-mail: addresses, letters, and their transports."""
