"""Files of any supported kind, read as rows."""
