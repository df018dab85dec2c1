"""Callbacks for the trainers people use. Each is imported from its own module, which needs its own package."""
