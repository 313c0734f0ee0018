"""Measurements of whole parts next to what else a user could take, each in processes of their own."""
