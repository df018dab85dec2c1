"""Running code -> profile: what ran, in which module and phase."""
