"""What a model of the family is: its configuration, and every tensor that follows from it, with role, shape and name,
and what it is to the others. All that needs to know the architecture asks here."""
