"""From feedback to preference pairs: stores, policy kinds, pair building, exports, checks."""
