"""The products service: the catalogue, its search, and the only source of prices."""
