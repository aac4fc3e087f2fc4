"""Mail: addresses, letters, and the ways on which letters leave."""
