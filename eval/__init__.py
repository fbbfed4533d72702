"""Is it better? Policies, metrics, off-policy value, bootstrap intervals, comparisons, reports."""
