"""The one door for folders that come from others."""
