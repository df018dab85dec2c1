"""Profile -> text: one renderer a file, each a pure function of the profile."""
