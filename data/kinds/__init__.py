"""Policy kinds: what an agent decides about, one file a kind."""
