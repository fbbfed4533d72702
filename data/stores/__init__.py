"""Feedback stores: JSON Lines, SQLite and PostgreSQL behind one protocol."""
