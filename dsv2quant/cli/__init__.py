"""The command line: one file per verb. Each parses, calls the library and prints; nothing else. torch is imported
when a verb needs it, so that help and mistakes are instant."""
