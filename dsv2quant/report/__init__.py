"""What a person reads: plans and results as text and JSON, warnings, the model card. Nothing here decides
anything."""
