"""What a person reads afterwards: tables, model card, manifest."""
