"""What a model of the family is: its configuration, and every tensor that follows from it, with role, shape and name.
All that needs to know the architecture asks here."""
