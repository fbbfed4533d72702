"""One decoder, configured per architecture."""
