"""Release: from a checkpoint to artifacts that are measured, described and checked, in one run."""
