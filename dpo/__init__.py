"""The engine of Direct Preference Optimization."""
