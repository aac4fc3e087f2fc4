"""The chassis: what every service stands on; it knows no word of the shop."""
